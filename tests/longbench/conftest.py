"""Fixtures that write small runs as longbench_pred.py does."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsecache.longbench.baseline import Baseline, make_baseline
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.scores import ScoringOptions, score_run

Rows = list[dict[str, Any]]


@pytest.fixture(scope="session")
def row() -> Callable[..., dict[str, Any]]:
    """Return a function that makes a finished row; `...` omits a key."""

    def make(number: int | str, pred: str = "yes", **more: Any) -> dict[str, Any]:
        made = {
            "pred": pred,
            "answers": ["yes"],
            "all_classes": None,
            "length": 100,
            "_id": str(number),
            "prompt_tokens": 50,
            "prompt_sha256": f"{number:0>4}" * 16,
            **more,
        }
        return {key: value for key, value in made.items() if value is not ...}

    return make


@pytest.fixture
def make_run(tmp_path: Path, write_run: Callable[..., Path]) -> Callable[..., Path]:
    """Return `write_run` for the folder of the test."""
    return functools.partial(write_run, tmp_path)


@pytest.fixture(scope="session")
def score_to_baseline() -> Callable[..., Baseline]:
    """Return a function that scores a folder and makes a baseline of it."""

    def make(folder: Path, e: bool = False, options: ScoringOptions = ScoringOptions()) -> Baseline:
        return make_baseline(score_run(folder, e, options), options)

    return make


@pytest.fixture
def make_baseline_run(
    make_run: Callable[..., Path], row: Callable[..., dict[str, Any]], score_to_baseline: Callable[..., Baseline]
) -> Callable[..., Baseline]:
    """Return a function that makes a baseline from letters per dataset: score 1 (y), 0 (n), 2/3 (h), failed (x)."""
    texts = {"y": "yes", "n": "no", "h": "yes maybe"}

    def make(name: str, datasets: dict[str, str], more: dict[str, Any] | None = None, **options: Any) -> Baseline:
        rows = {
            stem: [
                row(at, "", error="x") if letter == "x" else row(at, texts[letter], **(more or {}))
                for at, letter in enumerate(letters)
            ]
            for stem, letters in datasets.items()
        }
        return score_to_baseline(make_run(name, rows, **options))

    return make


@pytest.fixture(scope="session")
def write_run() -> Callable[..., Path]:
    """Return a function that writes a run: rows by file stem, and run.json with an identity and one session.

    `identity` and `session` change parts of these; `expected` changes numbers of rows; record=False: no run.json.
    """

    def write(
        below: Path,
        name: str,
        datasets: dict[str, Rows],
        identity: dict[str, Any] | None = None,
        session: dict[str, Any] | None = None,
        expected: dict[str, int] | None = None,
        record: bool = True,
    ) -> Path:
        folder = below / "pred" / "m" / name
        folder.mkdir(parents=True)
        for stem, rows in datasets.items():
            text = "".join(json.dumps(each) + "\n" for each in rows)
            (folder / f"{stem}.jsonl").write_text(text, encoding="utf-8")
        asked = {stem: len(rows) for stem, rows in datasets.items()} | (expected or {})
        clock = {"prefill_s": 1.0, "prefill_tokens": 900, "decode_s": 2.0, "decode_tokens": 100}
        clock["peak_gpu_bytes"] = 2**30
        run = {
            "identity": {
                "checkpoint": "c" * 64,
                "method": "vanilla",
                "options": {},
                "engine": "sparsecache",
                "dtype": "bfloat16",
                "window": 4096,
                "max_length": None,
                "stop_ids": [1],
                **{key: dict.fromkeys(datasets, key) for key in ("templates", "protocol", "data")},
                **(identity or {}),
            },
            "model": {"name": "m", "note": None},
            "datasets": {stem: {"expected_rows": rows} for stem, rows in asked.items()},
            "sessions": [{"id": "1-host", "device": "cuda", "gpu": "H200", "batch_size": 1, "clock": clock,
                          **(session or {})}],
        }  # fmt: skip
        if record:
            (folder / "run.json").write_text(json.dumps(run))
        return folder

    return write


@pytest.fixture
def scored(make_run: Callable[..., Path], row: Callable[..., dict[str, Any]]) -> Callable[..., RunScore]:
    """Return a function that scores a run from letters per dataset: 1 (y), 0 (n), 2/3 (h)."""
    texts = {"y": "yes", "n": "no", "h": "yes maybe"}
    classes = {"trec": ["yes", "no"]}

    def make(name: str, e: bool = False, options: dict[str, Any] | None = None, **datasets: str) -> RunScore:
        rows = {
            f"{stem}_e" if e else stem: [
                row(number, texts[letter], all_classes=classes.get(stem)) for number, letter in enumerate(letters)
            ]
            for stem, letters in datasets.items()
        }
        return score_run(make_run(name, rows, **(options or {})), e)

    return make
