"""Plots show the numbers of the comparison, their files are reproducible, their colors distinct.

In one file because every kind of plot is tested with the same runs.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy
import pytest

from sparsecache.errors import UsageError
from sparsecache.longbench.compare import compare
from sparsecache.longbench.html import parts
from sparsecache.longbench.paired import common_rows_or_all
from sparsecache.longbench.plots import draw_all, get_plot, plot_kinds
from sparsecache.longbench.plots._axes import MAX_RUNS, shorten
from sparsecache.longbench.plots._figure import REFERENCE, RULE, SERIES, Plot, line_style
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


def draw(kind: str, *runs: RunScore) -> Plot:
    return get_plot(kind)(common_rows_or_all(runs).runs)


def labels(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_yticklabels()]


def legend(plot: Plot) -> list[str]:
    return [text.get_text() for each in plot.figure.legends for text in each.get_texts()]


def error_bar_ends(axis: Any, along: int) -> list[numpy.ndarray]:
    """Return the ends of the error bars per container: [bars, 2]."""
    return [
        numpy.array(lines.get_segments())[:, :, along]
        for each in axis.containers
        if hasattr(each, "has_xerr")
        for lines in each[2]
    ]


# Content


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


def test_methods_have_a_panel_each_with_the_points_of_the_frontier(scored: Callable[..., RunScore]) -> None:
    runs = [scored("full", qasper="yy")]
    for number, method in enumerate("abcdefg"):
        runs += [scored(f"{method}{kept}", method, kept + number / 100, qasper="yn") for kept in (0.1, 0.2)]
    plot = draw("methods", *runs)
    panels = plot.figure.axes
    assert [panel.get_title() for panel in panels] == list("abcdefg")
    for number, panel in enumerate(panels):
        colored = [line for line in panel.lines if line.get_color() == SERIES[0] and len(line.get_xdata())]
        assert [list(line.get_xdata()) for line in colored] == [pytest.approx([0.1 + number / 100, 0.2 + number / 100])]
        assert sum(line.get_color() == RULE and len(line.get_xdata()) > 0 for line in panel.lines) == 6
    with pytest.raises(UsageError, match="needs 3 methods or more"):
        draw("methods", *runs[:5])


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


def test_buckets_show_means_over_datasets(scored_by_length: Callable[..., RunScore]) -> None:
    one = scored_by_length("one", qasper=[("y", 10), ("n", 10), ("y", 9000)], trec=[("n", 10)], hotpotqa=[("h", 5000)])
    two = scored_by_length("two", qasper=[("n", 10), ("n", 10), ("h", 9000)], trec=[("y", 10)], hotpotqa=[("y", 5000)])
    plot = draw("buckets", one, two)
    (axis,) = plot.figure.axes
    first, second = (each[0].get_ydata() for each in axis.containers)
    assert list(first) == [25.0, 66.67, 100.0]  # (50 + 0) / 2
    assert list(second) == [50.0, 100.0, 66.67]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0-4k", "4-8k", "8k+"]
    assert legend(plot) == ["one", "two"]
    assert all(each[0].get_xdata()[1] == pytest.approx(1, abs=0.1) for each in axis.containers)


def test_bucket_intervals_are_those_of_a_mean_of_means(scored_by_length: Callable[..., RunScore]) -> None:
    letters = {"qasper": "ynyy" * 3, "hotpotqa": "nnyh" * 3}
    run = scored_by_length("one", **{name: [(letter, 10) for letter in text] for name, text in letters.items()})
    (axis,) = draw("buckets", run).figure.axes
    values = [[{"y": 1, "n": 0, "h": 2 / 3}[letter] for letter in text] for text in letters.values()]
    errors = [100 * numpy.std(each, ddof=1) / 12**0.5 for each in values]
    reach = 1.96 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2
    (ends,) = error_bar_ends(axis, 1)
    assert numpy.allclose(ends[0], [max(58.33 - reach, 0), min(58.33 + reach, 100)], atol=0.01)


def test_buckets_without_rows_are_left_out(scored_by_length: Callable[..., RunScore]) -> None:
    (axis,) = draw("buckets", scored_by_length("one", qasper=[("y", 10), ("n", 8000)])).figure.axes
    assert list(axis.containers[0][0].get_xdata()) == [0, 2]


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


def test_draw_all_returns_every_possible_plot(sweep: list[RunScore], scored_by_length: Callable[..., RunScore]) -> None:
    assert plot_kinds() == ["bars", "buckets", "frontier", "methods", "time"]
    kinds = ["Scores by dataset", "Score against kept share", "Prefill and decode time"]
    titles = [f"{kind}: m on LongBench" for kind in kinds]
    assert [plot.title for plot in draw_all(common_rows_or_all(sweep).runs)] == titles
    alone = draw_all([scored_by_length("e", qasper=[("y", 10)])])
    assert [plot.title.partition(":")[0] for plot in alone] == [kinds[0], "Scores by length", kinds[2]]


# Refused plots


def test_impossible_plots_are_refused(
    scored: Callable[..., RunScore], scored_by_length: Any, make_run: MakeRun
) -> None:
    runs = [scored(str(at), qasper="yn") for at in range(MAX_RUNS + 1)]
    assert draw("bars", *runs[:-1])
    with pytest.raises(
        UsageError, match=r"^8 runs are too many for this plot; it shows at most 7\. Name fewer runs, or use --kind fro"
    ):
        draw("bars", *runs)
    with pytest.raises(UsageError, match=r"No run reports a kept share .* Name runs of sparse methods"):
        draw("frontier", *runs)
    with pytest.raises(UsageError, match=r"^This plot needs two runs or more\. Name several"):
        draw("frontier", scored("alone", "h2o", 0.1, qasper="yn"))
    with pytest.raises(UsageError, match=r"Only LongBench-E has length buckets\. Add --e"):
        draw("buckets", runs[0])
    with pytest.raises(UsageError, match=r"No row of .*one has a length"):
        draw("buckets", scored_by_length("one", qasper=[("y", None)]))
    with pytest.raises(UsageError, match=r"No run\.json records decode times"):
        draw("time", score_run(make_run("bare", {"qasper": [{"pred": "", "answers": []}]}, record=False)))
    with pytest.raises(UsageError, match=r"^empty: there are no rows, so there is no score to plot"):
        draw("bars", score_run(make_run("empty", {"qasper": []})))


# Files


@pytest.mark.parametrize("suffix", [".svg", ".pdf", ".PNG"])
def test_files_are_reproducible(sweep: list[RunScore], tmp_path: Path, suffix: str) -> None:
    starts = {".svg": b"<?xml", ".pdf": b"%PDF", ".PNG": b"\x89PNG"}
    for kind in ("bars", "frontier", "time"):
        draw(kind, *sweep).save(tmp_path / f"a{suffix}")
        with matplotlib.rc_context({"font.size": 40, "axes.facecolor": "red", "text.parse_math": True}):
            draw(kind, *sweep).save(tmp_path / f"b{suffix}")
        content = (tmp_path / f"a{suffix}").read_bytes()
        assert content == (tmp_path / f"b{suffix}").read_bytes()
        assert content.startswith(starts[suffix])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [f"a{suffix}", f"b{suffix}"]


def test_an_unknown_suffix_or_an_unwritable_file_is_refused(scored: Callable[..., RunScore], tmp_path: Path) -> None:
    plot = draw("bars", scored("a", qasper="yn"))
    for name in ("a.jpg", "a", "svg"):
        with pytest.raises(UsageError, match=rf"{name} has no suffix of an image format.*\.svg, \.pdf or \.png\.$"):
            plot.save(tmp_path / name)
    with pytest.raises(UsageError, match=r"a\.svg cannot be written: No such file or directory"):
        plot.save(tmp_path / "missing" / "a.svg")


NAMES = ["_hidden", "$x$ & <b>", "一个很长的名字", "a\nb\x1b[0m", "not\ufffexml\uffff", "n" * 90]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_plain_text(scored: Callable[..., RunScore], name: str) -> None:
    one, two = scored(name, name, 0.1, qasper="yn"), scored("plain", qasper="yy")
    for kind in ("bars", "frontier", "time"):
        plot = draw(kind, one, two)
        svg = ElementTree.fromstring(plot.svg())
        texts = ["".join(each.itertext()) for each in svg.iter("{http://www.w3.org/2000/svg}text")]
        assert shorten(name, {"bars": 44, "frontier": 40, "time": 24}[kind]) in texts
        assert shorten(name) in plot.caption or kind != "bars"


def test_long_names_lose_their_middle() -> None:
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghijk", 10) == "abcde…hijk" and len(shorten("a" * 99, 24)) == 24
    assert shorten("") == "-"


# Colors

# Severity 1 of Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision
# Deficiency" (2009), on linear RGB.
VISION = {
    "usual": numpy.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
JUST_NOTICEABLE = 2.3  # distance in CIELAB


def linear(color: str) -> numpy.ndarray:
    values = numpy.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return numpy.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: numpy.ndarray) -> numpy.ndarray:
    xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ratio = numpy.array(xyz) @ numpy.clip(rgb, 0, 1) / [0.9505, 1, 1.089]
    x, y, z = numpy.where(ratio > 0.008856, numpy.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return numpy.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def luminance(color: str) -> float:
    return float(numpy.array([0.2126, 0.7152, 0.0722]) @ linear(color))


@pytest.fixture(scope="module")
def css() -> str:
    return (Path(parts.__file__).parent / "report.css").read_text(encoding="utf-8")


@pytest.fixture(params=["paper", "dark"])
def run_colors(request: pytest.FixtureRequest, css: str) -> tuple[list[str], str]:
    """Return the colors of runs and the color of the page."""
    written = [REFERENCE, *SERIES]
    if request.param == "paper":
        return written, "#ffffff"
    dark = css[css.index("prefers-color-scheme: dark") :]
    return [dark.partition(f"--c-{color[1:]}: ")[2][:7] for color in written], dark.partition("--page: ")[2][:7]


@pytest.mark.parametrize("vision", VISION)
def test_colors_are_distinct_for_color_blind_readers(run_colors: tuple[list[str], str], vision: str) -> None:
    seen = [lab(numpy.array(VISION[vision]) @ linear(color)) for color in run_colors[0]]
    assert min(numpy.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 4 * JUST_NOTICEABLE


def test_colors_have_contrast_with_the_page(run_colors: tuple[list[str], str]) -> None:
    page = luminance(run_colors[1])
    for color in run_colors[0]:
        low, high = sorted([page, luminance(color)])
        assert (high + 0.05) / (low + 0.05) >= 3, color


def test_twelve_line_styles_are_distinct_in_grayscale() -> None:
    looks = [line_style(number) for number in range(12)]
    assert len({(look["marker"], str(look["linestyle"])) for look in looks}) == 12
