"""The frontier shows mean score against kept share, with a line per method and the paired intervals."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import pytest

from sparsecache.longbench.compare import compare
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.scores import score_run
from tests.longbench.plots.drawing import draw, error_bar_ends, legend


def test_the_frontier_has_a_line_per_method(sweep: list[RunScore]) -> None:
    mean = next(line for line in compare(sweep, resamples=9).groups if line.name == "flat_mean")
    full, *sparse = [(entry.kept, entry.score) for entry in mean.entries]
    plot = draw("frontier", *sweep)
    (axis,) = plot.figure.axes
    line, *lines = (line for line in axis.lines if len(line.get_xdata()))
    assert list(line.get_ydata()) == [full[1]] * 2
    points = [list(map(tuple, each.get_xydata())) for each in lines]
    assert points == [[sparse[1], sparse[0]], [sparse[2]]]  # from the smallest share on
    assert legend(plot) == ["vanilla (full cache)", "h2o", "quest"]
    assert axis.get_xscale() == "log"
    low, high = axis.get_xlim()
    assert low < 0.015 and high > 0.2 and [text.get_text() for text in axis.get_xticklabels()] == [
        "2%", "5%", "10%", "20%"]  # fmt: skip
    assert plot.caption == (
        "Mean score of 3 datasets (44 rows) against the share of past tokens attended to. Error bars are 95% intervals "
        "of the paired difference to vanilla."
    )
    drawn_low, drawn_high = axis.get_ylim()
    assert all(drawn_low < y < drawn_high for y in [full[1], *(score for _, score in sparse)])


def test_error_bars_are_the_paired_intervals_of_the_comparison(sweep: list[RunScore]) -> None:
    mean = next(line for line in compare(sweep).groups if line.name == "flat_mean")
    (axis,) = draw("frontier", *sweep).figure.axes
    full = mean.entries[0].score
    expected = sorted(
        tuple(entry.score + end - entry.difference.mean for end in entry.difference.interval)
        for entry in mean.entries[1:]
    )
    found = sorted(tuple(ends) for bars in error_bar_ends(axis, 1) for ends in bars)
    assert numpy.allclose(found, expected) and full < 100
    few = [replace(run, datasets=run.datasets[-1:]) for run in sweep]  # 4 rows
    plot = draw("frontier", *few)
    assert not error_bar_ends(plot.figure.axes[0], 1) and "Error bars" not in plot.caption


def with_options(run: RunScore, **options: Any) -> RunScore:
    return replace(run, run=replace(run.run, identity=replace(run.run.identity, options=options)))


def test_each_group_of_options_has_a_line(scored: Callable[..., RunScore]) -> None:
    runs = [scored("full", qasper="yn")]
    for name, kept, options in (
        ("a", 0.1, {"budget": 64, "alpha": 4}), ("b", 0.2, {"budget": 0.2, "alpha": 4}),
        ("c", 0.3, {"budget": 64, "alpha": math.inf}), ("d", 0.4, {"budget": 64, "alpha": math.inf, "sinks": 4}),
    ):  # fmt: skip
        runs.append(with_options(scored(name, "infinigen", kept, qasper="yy"), **options))
    for name, kept, page in (("e", 0.1, 16), ("f", 0.3, 32)):
        runs.append(with_options(scored(name, "quest", kept, qasper="yy"), budget=9, page=page))
    runs.append(replace(scored("g", "snapkv", 0.3, qasper="yy"), label="my point"))
    plot = draw("frontier", *runs)
    assert legend(plot) == [
        "full (full cache)", "infinigen alpha=4", "infinigen alpha=inf", "infinigen alpha=inf sinks=4",
        "quest", "snapkv"
    ]  # fmt: skip
    (axis,) = plot.figure.axes
    assert [text.get_text() for text in axis.texts] == ["64", "20%", "64", "64", "page=16", "page=32", "my point"]
    styles = [(line.get_color(), line.get_marker(), str(line.get_linestyle())) for line in axis.lines[1:]]
    assert len({color for color, *_ in styles}) == 3  # a color per method
    assert (
        len(
            {
                (line.get_color(), line.get_dashes() if hasattr(line, "get_dashes") else str(line._dash_pattern))
                for line in axis.lines[1:]
            }
        )
        == 5
    )


def test_hashes_of_methods_are_shown_only_where_names_are_equal(scored: Callable[..., RunScore]) -> None:
    methods = [f"{name}@{digit * 16}" for name, digit in (("mine", "0"), ("mine", "1"), ("other", "2"))]
    runs = [scored(method, method, 0.1, qasper="yn") for method in methods]
    assert legend(draw("frontier", *runs)) == [*methods[:2], "other"]
    assert legend(draw("frontier", *runs[1:])) == ["mine", "other"]


def test_labels_of_near_points_do_not_overlap(scored: Callable[..., RunScore]) -> None:
    letters = {"a": "yy", "b": "yh", "c": "yy"}
    runs = [
        replace(scored(f"{method}{kept}", method, kept, qasper=letters[method]), label=f"{method} {kept}")
        for method in letters
        for kept in (0.1, 0.3)
    ]
    full = scored("full", qasper="yy")
    for kind in ("frontier", "methods"):
        figure = draw(kind, full, *runs).figure
        found = 0
        for axis in figure.axes:
            boxes = [text.get_window_extent() for text in axis.texts if text.get_text()]
            assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))
            assert all(box.y1 <= axis.bbox.y1 for box in boxes)  # a title stands above
            found += len(boxes)
        assert found == len(runs)


def test_a_study_of_many_methods_has_a_legend_beside_the_plot(scored: Callable[..., RunScore]) -> None:
    methods = [f"method{number}" for number in range(25)]
    runs = [scored(f"{method}-{kept}", method, kept, qasper="yn") for method in methods for kept in (0.1, 0.2)]
    plot = draw("frontier", scored("full", qasper="yy"), *runs)
    assert legend(plot) == ["full (full cache)", *methods]
    assert tuple(plot.figure.get_size_inches()) > (6, 3)
    looks = {(line.get_color(), line.get_marker()) for line in plot.figure.axes[0].lines[1:]}
    assert len(looks) == 25 and not plot.figure.axes[0].texts


@pytest.mark.parametrize("benchmarks", [1, 2, 3])
def test_labels_of_axes_do_not_overlap(make_run: Callable[..., Any], row: Callable[..., Any], benchmarks: int) -> None:
    stems = ["qasper", "longbench_v2", "niah_single_1_4096"][:benchmarks]
    v2 = {"answers": ["A"], "length": "short", "difficulty": "easy"}
    runs = []
    for number in range(9):  # with so many the legend is beside the axes
        rows = {stem: [row(0, kept=0.1, **(v2 if stem == "longbench_v2" else {}))] for stem in stems}
        runs.append(score_run(make_run(str(number), rows, {"method": f"method{number}"})))
    figure = draw("frontier", *runs).figure
    found = [axis.xaxis.label for axis in figure.axes]
    assert [" ".join(label.get_text().split()) for label in found] == [
        "kept share of past tokens in sparse layers"
    ] * benchmarks
    boxes = [label.get_window_extent() for label in found]
    assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))


def test_the_line_shows_vanilla_and_the_caption_names_other_full_caches(scored: Callable[..., RunScore]) -> None:
    runs = [
        scored("other", "transformers", qasper="yn"),
        scored("full", qasper="yy"),
        scored("s", "h2o", 0.3, qasper="yh"),
    ]
    plot = draw("frontier", *runs)
    assert legend(plot) == ["full (full cache)", "h2o"]
    assert plot.caption.endswith("Not shown, because they report no kept share: other.")


@pytest.mark.parametrize(("share", "score"), [(0.0003, "n"), (0.35, "y"), (1.0, "h"), (0.5, "y")])
def test_a_single_point_is_within_labeled_axes(scored: Any, share: float, score: str) -> None:
    runs = [scored(name, "h2o", share, qasper=score) for name in ("a", "b")]
    (axis,) = draw("frontier", *runs).figure.axes
    (low, high), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    assert low < share < high and high / low > 4 and len(axis.get_xticks()) >= 2
    assert bottom < {"n": 0, "y": 100, "h": 66.67}[score] < top and 1 < len(axis.get_yticks()) < 12
    assert min(axis.get_yticks()) >= 0 and max(axis.get_yticks()) <= 100 and max(axis.get_xticks()) <= 1
