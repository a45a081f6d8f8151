"""Times are the sums that run.json records."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsecache.longbench.scores import score_run
from tests.longbench.plots.drawing import draw, labels

MakeRun = Callable[..., Path]
Row = Callable[..., dict[str, Any]]


def test_times_are_summed_over_sessions(make_run: MakeRun, row: Row) -> None:
    clocks = {"a": (30.0, 90.0, 1000), "b": (40.0, 400.0, 20_000)}
    runs = []
    for name, (prefill, decode, tokens) in clocks.items():
        clock = {"prefill_s": prefill, "prefill_tokens": 9, "decode_s": decode, "decode_tokens": tokens}
        session = {"clock": {**clock, "peak_gpu_bytes": None}}
        runs.append(score_run(make_run(name, {"qasper": [row(0)]}, session=session)))
    runs.append(score_run(make_run("c", {"qasper": [row(0)]}, record=False)))
    plot = draw("time", *runs)
    left, right = plot.figure.axes
    prefill, decode = left.containers
    assert list(prefill.datavalues) == pytest.approx([0.5, 40 / 60])
    assert [bar.get_x() for bar in decode] == pytest.approx([0.5, 40 / 60])
    assert [bar.get_width() for bar in decode] == pytest.approx([1.5, 400 / 60])
    assert list(right.containers[0].datavalues) == [90.0, 20.0]
    assert [text.get_text() for text in right.texts] == ["90.0", "20.0"]
    assert labels(left) == ["a", "b"]  # c has no clock
    assert (left.get_xlabel(), right.get_xlabel()) == ("minutes", "decode, ms/token")
