"""The same run through transformers' own generate, and comparisons with it."""

import json
import shutil
from typing import Any

import torch

from sparsecache.methods.vanilla import Vanilla
from sparsecache.synthetic.rows import make_rows


def test_the_transformers_engine_gives_the_same_rows(predict, folder, read_untimed, read_record) -> None:
    arguments = ("--datasets", "qasper,samsum,vcsum", "--max_samples", "2")
    assert predict(*arguments).exit_code == 0
    assert predict(*arguments, "--engine", "transformers", "--name", "theirs").exit_code == 0
    for dataset in ("qasper", "samsum", "vcsum"):
        assert read_untimed(folder / f"{dataset}.jsonl") == read_untimed(folder.parent / "theirs" / f"{dataset}.jsonl")
    assert read_record(folder.parent / "theirs")["identity"]["engine"] == "transformers"


def test_verify_compares_first_and_counts_only_the_runs_own_tokens(predict, folder, read_rows, read_record) -> None:
    told = predict("--datasets", "qasper,trec", "--verify", "4")
    assert told.exit_code == 0
    assert "verify: 4 of 4 prompts give the text of transformers." in told.stdout
    (session,) = read_record(folder)["sessions"]
    assert session["verify"] == {"prompts": 4, "differing": []}
    rows = [row for dataset in ("qasper", "trec") for row in read_rows(folder / f"{dataset}.jsonl")]
    assert session["clock"]["decode_tokens"] == sum(row["new_tokens"] - 1 for row in rows)


def test_verify_says_where_texts_part(predict, folder, monkeypatch, read_record) -> None:
    whole = Vanilla.attend
    steps = iter(range(10**6))

    def lie(self: Vanilla, *arguments: Any) -> torch.Tensor:
        return whole(self, *arguments) * (1 if next(steps) < 5 else -3)

    monkeypatch.setattr(Vanilla, "attend", lie)
    told = predict("--verify", "1")
    (session,) = read_record(folder)["sessions"]
    (difference,) = session["verify"]["differing"]
    assert difference["_id"] == make_rows("qasper", 1, 256, 0)[0]["_id"] and difference["dataset"] == "qasper"
    assert difference["first_differing_token"] >= 6
    assert f"texts part at new token {difference['first_differing_token']}" in told.stdout
    assert "verify: 0 of 1 prompts" in told.stdout


def test_verify_takes_the_first_wanted_rows_also_of_a_finished_run(predict, folder, monkeypatch, read_record) -> None:
    assert predict("--datasets", "qasper,trec").exit_code == 0
    before = {name: (folder / f"{name}.jsonl").read_bytes() for name in ("qasper", "trec")}
    asked = _record_generations(monkeypatch)
    told = predict("--datasets", "qasper,trec", "--max_samples", "2", "--verify", "3")
    assert told.exit_code == 0, told.output
    assert "verify: 3 of 3 prompts give the text of transformers." in told.stdout
    assert read_record(folder)["sessions"][-1]["verify"] == {"prompts": 3, "differing": []}
    ids = [row["_id"] for name, rows in (("qasper", 2), ("trec", 1)) for row in make_rows(name, rows, 256, 0)]
    assert [(engine, row) for engine, rows in asked for row in rows] == [
        *(("TransformersEngine", row) for row in ids),
        *(("Generator", row) for row in ids),
    ]
    assert {name: (folder / f"{name}.jsonl").read_bytes() for name in before} == before
    clock = read_record(folder)["sessions"][-1]["clock"]
    assert (clock["prefill_tokens"], clock["decode_tokens"]) == (0, 0)


def _record_generations(monkeypatch) -> list[tuple[str, list[str]]]:
    """Every call of an engine that was asked for something, as its class and the rows' ids."""
    from sparsecache.engine.generator import Generator
    from sparsecache.engine.reference import TransformersEngine

    asked: list[tuple[str, list[str]]] = []
    for kind in (TransformersEngine, Generator):

        def generate(self: Any, requests: Any, *arguments: Any, whole: Any = kind.generate) -> Any:
            if known := list(requests):
                asked.append((type(self).__name__, [request.key[0]["_id"] for request in known]))
            return whole(self, known, *arguments)

        monkeypatch.setattr(kind, "generate", generate)
    return asked


def test_a_condensed_rope_is_decoded_alike_by_both_engines(predict, tiny, tmp_path, read_rows) -> None:
    longchat = shutil.copytree(tiny, tmp_path / "longchat")
    config = json.loads((longchat / "config.json").read_text())
    parameters = config.pop("rope_parameters")
    config |= {"rope_theta": parameters["rope_theta"], "rope_condense_ratio": 8}
    (longchat / "config.json").write_text(json.dumps(config))
    told = predict("--model", str(longchat), "--verify", "3")
    assert told.exit_code == 0, told.output
    assert "verify: 3 of 3 prompts" in told.stdout
    assert predict().exit_code == 0
    texts = [
        [row["pred"] for row in read_rows(tmp_path / "pred" / name / "vanilla" / "qasper.jsonl")]
        for name in ("longchat", "tiny")
    ]
    assert texts[0] != texts[1]
