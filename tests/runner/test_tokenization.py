"""A run's rows are tokenized alike, by one wrapper: what says so is recorded, and another run is refused."""

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparsecache.engine.tokenizer import Tokenizer
from sparsecache.longbench.wrapping import ids_sha256

real_version = importlib.metadata.version


def _identity(read_record, folder: Path) -> dict[str, Any]:
    return dict(read_record(folder)["identity"])


def test_the_identity_says_how_prompts_were_made(predict, folder, read_record) -> None:
    assert predict("--chat", "Q: {prompt} A:").exit_code == 0
    found = _identity(read_record, folder)
    assert found["chat"] == found["chat_wrapper"] == "Q: {prompt} A:"
    assert found["chat_clock"] == "2024-07-26"
    assert len(found["probe_ids_sha256"]) == 64
    assert found["transformers"] == real_version("transformers")
    assert found["tokenizers"] == real_version("tokenizers")


def test_each_row_has_the_hash_of_its_ids(predict, folder, read_rows, monkeypatch) -> None:
    seen = []
    whole = Tokenizer.encode

    def encode(self: Tokenizer, text: str, **options: Any) -> list[int]:
        seen.append(ids_sha256(whole(self, text, **options)))
        return whole(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", encode)
    assert predict().exit_code == 0
    assert all(row["prompt_ids_sha256"] in seen for row in read_rows(folder / "qasper.jsonl"))


@pytest.mark.parametrize("name", ["transformers", "tokenizers"])
def test_a_run_is_not_resumed_under_another_version(name, predict, folder, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        older = {"transformers": "5.15.1", "tokenizers": "0.22.2"}
        patch.setattr(
            importlib.metadata, "version", lambda asked: older[name] if asked == name else real_version(asked)
        )
        assert predict("--max_samples", "1").exit_code == 0
    before = (folder / "qasper.jsonl").read_bytes()
    told = predict()
    assert told.exit_code == 2 and (folder / "qasper.jsonl").read_bytes() == before
    assert f"{name}: {older[name]}, now {real_version(name)}" in told.stderr and "--overwrite" in told.stderr


def test_a_run_is_not_resumed_by_a_tokenizer_that_makes_other_ids(predict, folder, monkeypatch) -> None:
    whole = Tokenizer.encode
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", lambda self, text, **options: whole(self, text.replace(" ", ""), **options))
        assert predict("--max_samples", "1").exit_code == 0
    told = predict()
    assert told.exit_code == 2 and "the token ids that the tokenizer gives a test text: not the same" in told.stderr


def test_a_run_that_does_not_record_its_tokenization_is_not_resumed(predict, folder) -> None:
    assert predict("--max_samples", "1").exit_code == 0
    record = json.loads((folder / "run.json").read_text())
    del record["identity"]["probe_ids_sha256"]
    (folder / "run.json").write_text(json.dumps(record))
    told = predict()
    assert told.exit_code == 2 and "the token ids that the tokenizer gives a test text: not recorded" in told.stderr


@pytest.fixture
def chatting(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint with a chat template."""
    folder = shutil.copytree(tiny, tmp_path / "chatting")
    (folder / "chat_template.jinja").write_text("<u>{{ messages[0].content }}</u><a>")
    return folder


@pytest.mark.parametrize(
    ("chat", "wrapper"),
    [
        ([], "<u>{prompt}</u><a>"),
        (["--chat", "template"], "<u>{prompt}</u><a>"),
        (["--chat", "none"], "{prompt}"),
        (["--chat", "[INST]{prompt}[/INST]"], "[INST]{prompt}[/INST]"),
    ],
)
def test_chat_on_the_command_line(chat, wrapper, chatting, predict, tmp_path, read_record, read_rows) -> None:
    told = predict("--model", str(chatting), "--max_samples", "1", *chat)
    assert told.exit_code == 0, told.output
    folder = tmp_path / "pred" / "chatting" / "vanilla"
    assert _identity(read_record, folder)["chat_wrapper"] == wrapper
    (row,) = read_rows(folder / "qasper.jsonl")
    assert row["prompt_end"].endswith(wrapper.partition("{prompt}")[2])


def test_chat_overrides_the_models_table(chatting, predict, tmp_path, read_record, monkeypatch) -> None:
    tables = {"chatting": {"hub": "owner/chatting", "chat": "[INST]{prompt}[/INST]"}}
    monkeypatch.setattr("sparsecache.engine.model_registry.read_tables", lambda name: tables)
    folder = tmp_path / "pred" / "chatting"
    for name, chat, wrapper in (("a", [], "[INST]{prompt}[/INST]"), ("b", ["--chat", "none"], "{prompt}")):
        assert predict("--model", str(chatting), "--max_samples", "1", "--name", name, *chat).exit_code == 0
        assert _identity(read_record, folder / name)["chat_wrapper"] == wrapper


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ("Read. {promt}", "must hold {prompt} once"),
        ("template", 'has no chat template, but --chat is "template"'),
    ],
)
def test_a_chat_that_cannot_be_used_is_refused_before_any_weight(chat, message, predict, forbid_weights) -> None:
    forbid_weights()
    told = predict("--chat", chat)
    assert told.exit_code == 2 and message in told.stderr and told.stderr.count("\n") == 1


def test_warnings_of_transformers_are_shown_once_and_noise_is_not(capsys) -> None:
    from transformers.utils import logging

    from sparsecache.engine.library_warnings import show_library_warnings

    logger = logging.get_logger("transformers.tokenization_utils_base")
    for _ in range(2):
        show_library_warnings()
        logger.warning("an incorrect regex\n pattern")
        logger.warning("Token indices sequence length is longer than the specified maximum sequence length (9 > 8)")
        logger.info("nothing")
    assert capsys.readouterr().err == "Warning: transformers: an incorrect regex pattern\n"


def test_a_wrong_label_is_told_before_the_first_row(tiny, predict, tmp_path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "labelled")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "GPT2Tokenizer"}))
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True})
    stored["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    told = predict("--model", str(folder), "--max_samples", "1")
    assert told.exit_code == 0
    assert told.stderr.count("tokenizes some texts differently") == 1
