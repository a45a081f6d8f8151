"""Score against kept share, for sweeps: a line per method, and the full cache as a band."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sparsecache.errors import UsageError
from sparsecache.longbench.plots._axes import (
    error_bar,
    legend_above,
    run_labels,
    set_score_axis,
    set_share_axis,
    shorten,
)
from sparsecache.longbench.plots._figure import REFERENCE, Plot, line_style, new_figure, with_style
from sparsecache.longbench.score_types import MEANS, Average, RunScore

_NAMES = {"flat_mean": "LongBench", "longbench_v2": "LongBench v2", "own_mean": "own tasks"}


class _Point(NamedTuple):
    share: float
    score: float


@with_style
def draw(runs: Sequence[RunScore]) -> Plot:
    """Return the plot of mean scores over datasets against kept shares, on a logarithmic axis.

    LongBench, LongBench v2 and own tasks have an axis each, as far as the runs have them. The full cache is a run
    without a kept share, `vanilla` if it is among them; its band is the 95 % interval of its mean.

    Raises UsageError for a single run, and if no run reports a kept share.
    """
    if len(runs) < 2:
        raise UsageError("This plot needs two runs or more. Name several, with the full cache, or use another --kind.")
    lines = {mean: found for mean in MEANS.values() if (found := _lines(runs, mean))}
    if not lines:
        raise UsageError(
            "No run reports a kept share for its datasets. Name runs of sparse methods, or use another --kind."
        )
    methods = list(dict.fromkeys(method for found in lines.values() for method in found))
    named = list(zip(run_labels(runs), runs, strict=True))
    full = [(name, run) for name, run in named if all(_kept(run, mean) is None for mean in lines)]
    full.sort(key=lambda named: _method(named[1]) != "vanilla")
    figure, axes = new_figure(2.5, len(lines), squeeze=False)
    for axis, (mean, found) in zip(axes[0], lines.items(), strict=True):
        set_share_axis(axis, [point.share for points in found.values() for point in points])
        legend = [_draw_band(axis, name, run.averages[mean]) for name, run in full[:1]]
        for number, method in enumerate(methods):
            (line,) = axis.plot(
                [point.share for point in found.get(method, ())],
                [point.score for point in found.get(method, ())],
                clip_on=False,
                zorder=3,
                **line_style(number),
            )
            legend.append((line, shorten(method, 24)))
        set_score_axis(axis)
        axis.set_xlabel("kept share of past tokens")
        if len(lines) > 1:
            axis.set_title(_NAMES[mean])
    axes[0][0].set_ylabel("mean score")
    legend_above(figure, *zip(*legend, strict=True))
    means = [(_NAMES[mean] if len(lines) > 1 else "", runs[0].averages[mean]) for mean in lines]
    return Plot("Score against kept share", " ".join(_caption(means, full)), figure)


def _lines(runs: Sequence[RunScore], mean: str) -> dict[str, list[_Point]]:
    """Return the points of a mean per method, in the order of the runs; points are sorted by share."""
    lines: dict[str, list[_Point]] = {}
    for run in runs:
        if share := _kept(run, mean):
            lines.setdefault(_method(run), []).append(_Point(share, run.averages[mean].score or 0.0))
    return {method: sorted(points) for method, points in lines.items()}


def _kept(run: RunScore, mean: str) -> float | None:
    return run.averages[mean].kept if mean in run.averages else None


def _method(run: RunScore) -> str:
    return run.run.identity.method or run.folder.name


def _draw_band(axis: Any, name: str, full: Average) -> tuple[Any, str]:
    """Draw the full cache's mean and interval. Returns a legend handle and label."""
    score = full.score or 0.0
    below, above = error_bar(score, full.stderr)
    band = axis.axhspan(score - below, score + above, color=REFERENCE, alpha=0.2, linewidth=0)
    return (band, axis.axhline(score, color=REFERENCE)), f"{shorten(name, 24)}, 95% interval"


def _caption(means: Sequence[tuple[str, Average]], full: Sequence[tuple[str, RunScore]]) -> Iterator[str]:
    parts = [f"{name + ': ' if name else ''}{mean.datasets} datasets ({mean.n} rows)" for name, mean in means]
    yield f"Mean score of {'; '.join(parts)} against the share of past tokens attended to."
    if full:
        yield f"The band is the 95% interval of the score of {full[0][0]}."
    if full[1:]:
        yield f"Not shown, because they report no kept share: {', '.join(name for name, _ in full[1:])}."
