"""Random checkpoints load like any checkpoint and are deterministic."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsecache.errors import UsageError
from sparsecache.testing.random_checkpoint import MODEL_TYPES, main, make_random_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "llama")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_each_family_loads_and_generates(model_type: str, tmp_path: Path) -> None:
    folder = make_random_checkpoint(tmp_path / model_type, model_type=model_type)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == model_type
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert len(tokenizer) == model.config.vocab_size == 1024
    assert getattr(model.config, "head_dim", 16) == 16
    assert getattr(model.config, "sliding_window", None) is None
    generated = model.generate(**tokenizer("One two", return_tensors="pt"), max_new_tokens=3)
    assert generated.shape[1] > len(tokenizer("One two").input_ids)


@pytest.mark.parametrize(
    "text",
    [
        "A plain sentence.",
        "吕东娟出生于哪一天？",
        "def f(x):\n\treturn x  # two  blanks\n",
        " é😀\x00\r\n<b>",
    ],
)
def test_the_tokenizer_restores_any_text_and_adds_one_bos(llama: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.chat_template is None


def test_the_seed_changes_only_the_weights(llama: Path, tmp_path: Path) -> None:
    same = make_random_checkpoint(tmp_path / "same")
    other = make_random_checkpoint(tmp_path / "other", seed=1)
    names = sorted(path.name for path in llama.iterdir())
    for folder in (same, other):
        assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        assert (same / name).read_bytes() == (llama / name).read_bytes()
        different = (other / name).read_bytes() != (llama / name).read_bytes()
        assert different == name.endswith(".safetensors")


def test_the_callers_random_state_is_unchanged(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_random_checkpoint(tmp_path / "checkpoint")
    assert torch.equal(torch.rand(3), expected)


def test_overrides_reach_the_config(tmp_path: Path) -> None:
    folder = make_random_checkpoint(tmp_path / "checkpoint", num_hidden_layers=2, tie_word_embeddings=True)
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert config.num_hidden_layers == 2
    assert config.tie_word_embeddings


def test_an_existing_folder_is_unchanged(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert make_random_checkpoint(tmp_path / "mine") == tmp_path / "mine"
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_failure_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model_max_length: int) -> None:
        raise RuntimeError("stopped half way")

    monkeypatch.setattr("sparsecache.testing.random_checkpoint.small_tokenizer", fail)
    with pytest.raises(RuntimeError, match="half way"):
        make_random_checkpoint(tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_model_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'gpt2'.*llama"):
        make_random_checkpoint(tmp_path / "checkpoint", model_type="gpt2")


def test_the_command_prints_the_folder_and_that_scores_are_meaningless(tmp_path: Path) -> None:
    command = [str(tmp_path / "checkpoint"), "--model_type", "qwen3", "--seed", "4"]
    first, second = (CliRunner().invoke(main, command) for _ in range(2))
    assert first.exit_code == second.exit_code == 0
    assert command[0] in first.output and "scores are meaningless" in first.output
    assert first.output.count("\n") == second.output.count("\n") == 1
    assert "left unchanged" in second.output


@pytest.mark.parametrize("field", ["hidden_size", "hidden_size=", "hidden_size=wide"])
def test_a_field_that_is_not_json_is_refused(field: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path / "checkpoint"), "-c", field])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: -c '{field}' is not KEY=VALUE with a JSON value")
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["-c", 'hidden_size="wide"'], "expected int, got str"),
        (["-c", "num_attention_heads=3"], "not a multiple"),
        (["-c", "hidden_size=-4"], "negative dimension"),
        (["--device", "nowhere"], "nowhere"),
    ],
)
def test_a_checkpoint_that_cannot_be_built_is_a_usage_error(arguments: list[str], reason: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path / "checkpoint"), *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: Could not write a llama checkpoint") and reason in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_options_may_be_spelled_with_dashes(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    command = [str(folder), "--model-type", "qwen2", "-c", "num_hidden_layers=1", "-c", "hidden_size=32"]
    assert CliRunner().invoke(main, command).exit_code == 0
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("qwen2", 1, 32)
