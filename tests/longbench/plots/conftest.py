"""Scored runs to plot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.scores import score_run

MakeRun = Callable[..., Path]
Row = Callable[..., dict[str, Any]]
TEXTS = {"y": "yes", "n": "no", "h": "yes maybe"}  # score 1, 0 and 2/3


@pytest.fixture
def scored(make_run: MakeRun, row: Row) -> Callable[..., RunScore]:
    """Return a function that scores a run from letters per dataset: 1 (y), 0 (n), 2/3 (h)."""

    def make(name: str, method: str = "vanilla", kept: float | None = None, **datasets: str) -> RunScore:
        more = {} if kept is None else {"kept": kept}
        rows = {
            stem: [row(at, TEXTS[letter], all_classes=["yes", "no"], **more) for at, letter in enumerate(letters)]
            for stem, letters in datasets.items()
        }
        return score_run(make_run(name, rows, {"method": method}))

    return make


@pytest.fixture
def sweep(scored: Callable[..., RunScore]) -> list[RunScore]:
    """Return runs of three datasets: the full cache, and two methods with several kept shares."""
    scores = {"vanilla": ("yyyh", None), "h2o-2": ("nnhy", 0.2), "h2o-1": ("nnny", 0.1), "quest-1": ("hhyy", 0.015)}
    return [
        scored(name, name.partition("-")[0], kept, qasper=letters * 5, hotpotqa=letters[::-1] * 5, trec="ynyn")
        for name, (letters, kept) in scores.items()
    ]


@pytest.fixture
def scored_by_length(make_run: MakeRun, row: Row) -> Callable[..., RunScore]:
    """Return a function that scores a LongBench-E run from (letter, length) pairs per dataset."""

    def make(name: str, **datasets: list[tuple[str, Any]]) -> RunScore:
        rows = {
            f"{stem}_e": [
                row(at, TEXTS[letter], length=length, all_classes=["yes", "no"])
                for at, (letter, length) in enumerate(lengths)
            ]
            for stem, lengths in datasets.items()
        }
        return score_run(make_run(name, rows), e=True)

    return make
