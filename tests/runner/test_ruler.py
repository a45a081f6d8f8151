"""Runs over RULER's tasks: prompts that end in the answer prefix, several lengths in one run, resume and refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsecache.api import make_settings
from sparsecache.longbench.scores import score_run

RULER = ("--datasets", "fwe,niah_multikey_3", "--ruler_rows", "2", "--ruler_length", "512", "--max_new_tokens", "2")


def test_a_run_holds_several_lengths(
    predict: Callable[..., Any], folder: Path, read_rows: Callable[..., Any], read_record: Callable[..., Any]
) -> None:
    sparse = ("--method", "snapkv", "-o", "budget=0.1", "-o", "dense_layers=0", "--name", "vanilla")
    result = predict(*RULER, *sparse)
    assert result.exit_code == 0 and "RULER with seed 42" in result.output, result.output
    more = predict(*RULER, *sparse, "--ruler_length", "640,512")
    assert more.exit_code == 0 and "4 of 8 to do" in more.output, more.output
    assert sorted(path.name for path in folder.glob("*.jsonl")) == [
        "fwe_512.jsonl", "fwe_640.jsonl", "niah_multikey_3_512.jsonl", "niah_multikey_3_640.jsonl",
    ]  # fmt: skip
    for row in read_rows(folder / "fwe_640.jsonl"):
        assert row["prompt_end"].endswith(" the three most frequently appeared words are:")
        assert 0.95 * 638 <= row["prompt_tokens"] <= 638 and len(row["answers"]) == 3 and not row["truncated"]
    record = read_record(folder)
    assert record["datasets"]["fwe_640"]["deviations"] == ["max_new_tokens is 2 instead of 50"]
    assert record["sessions"][0]["data"] == {"source": "ruler", "rows": 2, "seed": 42} and not record.get("tasks")
    run = score_run(folder)
    assert run.complete and run.averages["ruler"].n == 8


def test_the_identity_of_a_run_covers_its_rows(predict: Callable[..., Any]) -> None:
    assert predict(*RULER).exit_code == 0
    assert "0 of 4 to do" in predict(*RULER).output
    other = predict(*RULER, "--ruler_seed", "7")
    assert other.exit_code == 2 and "the data of fwe_512: not the same" in other.output


def test_ruler_stands_beside_other_datasets(predict: Callable[..., Any], read_record: Any, folder: Path) -> None:
    result = predict(*RULER, "--datasets", "fwe,qasper", "--max_samples", "1")
    assert result.exit_code == 0 and "sample and RULER with seed 42" in result.output
    assert read_record(folder)["sessions"][0]["data"]["ruler"]["seed"] == 42
    cleared = predict("--datasets", "qasper", "--max_samples", "1", "--overwrite")
    assert cleared.exit_code == 0 and [path.name for path in folder.glob("*.jsonl")] == ["qasper.jsonl"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--ruler_length", "1048576"), "--ruler_length 1048576 is longer than the window"),
        (("--e",), "is not part of LongBench-E"),
        (("--ruler_rows", "1000000"), "RULER with 1000000 rows of 512 tokens is too large"),
        (("--datasets", "qa_1"), "--ruler_squad FILE (dev-v2.0.json) for qa_1"),
    ],
)
def test_what_cannot_run_is_refused(more: tuple[str, ...], message: str, predict: Callable[..., Any]) -> None:
    result = predict(*RULER, *more)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


def test_python_takes_numbers_and_lists() -> None:
    assert make_settings("demo", ruler_length=8192).ruler_lengths == [8192]
    settings = make_settings("demo", ruler_length=[8192, 4096], ruler_essays="essays")
    assert settings.ruler_lengths == [4096, 8192] and settings.ruler_texts.essays == Path("essays")
