"""Bars show the scores and intervals of the comparison, per dataset."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy

from sparsecache.longbench.compare import compare
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.scores import score_run
from tests.longbench.plots.drawing import draw, error_bar_ends, labels, legend

MakeRun = Callable[..., Path]


def test_bars_show_the_scores_and_intervals_of_the_comparison(sweep: list[RunScore]) -> None:
    lines = [line for line in compare(sweep, resamples=9).groups if line.kind == "dataset" or line.name == "flat_mean"]
    plot = draw("bars", *sweep)
    (axis,) = plot.figure.axes
    groups = [each for each in axis.containers if hasattr(each, "datavalues")]
    for at, (group, interval) in enumerate(zip(groups, error_bar_ends(axis, 0), strict=True)):
        scores = [line.entries[at].score for line in lines]
        assert list(group.datavalues) == scores
        reach = [1.96 * (line.entries[at].stderr or 0) * (line.n >= 20) for line in lines]
        ends = [(max(s - r, 0), min(s + r, 100)) for s, r in zip(scores, reach, strict=True)]
        assert numpy.allclose(interval, ends)
    assert labels(axis) == [line.name for line in lines[:-1]] + ["mean"]
    assert [text.get_text() for text in axis.texts] == ["single doc qa", "multi doc qa", "few shot", "3 datasets"]
    assert legend(plot) == ["vanilla", "h2o-2", "h2o-1", "quest-1"]
    assert plot.caption.startswith("Score by dataset of vanilla, h2o-2, h2o-1, quest-1;")
    middles = [bar.get_y() + bar.get_height() / 2 for bar in itertools.chain(*groups)]
    assert len(set(middles)) == len(middles) and list(axis.get_ylim()) == sorted(axis.get_ylim(), reverse=True)


def test_a_single_run_has_bars(scored: Callable[..., RunScore], make_run: MakeRun) -> None:
    bare = [{"pred": "yes", "answers": ["yes"], "all_classes": None}, {"pred": "", "answers": ["yes"]}]
    run = score_run(make_run("elsewhere", {"qasper": bare}, record=False))  # rows without an _id
    plot = draw("bars", run)
    assert legend(plot) == []
    assert [list(each.datavalues) for each in plot.figure.axes[0].containers[:1]] == [[50.0]]
    assert labels(plot.figure.axes[0]) == ["qasper"]  # no mean of one
