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
from sparsecache.longbench.score_types import Average, RunScore


class _Point(NamedTuple):
    share: float
    score: float


@with_style
def draw(runs: Sequence[RunScore]) -> Plot:
    """Return the plot of mean scores over datasets against kept shares, on a logarithmic axis.

    The full cache is a run without a kept share, `vanilla` if it is among them; its band is the 95 % interval of its
    mean. Raises UsageError for a single run, if no run reports a kept share, and if no dataset is part of LongBench.
    """
    if len(runs) < 2:
        raise UsageError("This plot needs two runs or more. Name several, with the full cache, or use another --kind.")
    lines = _lines(runs)
    if not lines:
        raise UsageError(
            "No run reports a kept share for datasets of LongBench. Name runs of sparse methods, or use another --kind."
        )
    full = [(name, run) for name, run in zip(run_labels(runs), runs, strict=True) if _kept(run) is None]
    full.sort(key=lambda named: _method(named[1]) != "vanilla")
    figure, axis = new_figure(2.5)
    set_share_axis(axis, [point.share for points in lines.values() for point in points])
    legend = [_draw_band(axis, name, run.averages["flat_mean"]) for name, run in full[:1]]
    for number, (method, points) in enumerate(lines.items()):
        (line,) = axis.plot(*zip(*points, strict=True), clip_on=False, zorder=3, **line_style(number))
        legend.append((line, shorten(method, 24)))
    set_score_axis(axis)
    axis.set_xlabel("kept share of past tokens")
    axis.set_ylabel("mean score")
    legend_above(figure, *zip(*legend, strict=True))
    return Plot("Score against kept share", " ".join(_caption(runs[0].averages["flat_mean"], full)), figure)


def _lines(runs: Sequence[RunScore]) -> dict[str, list[_Point]]:
    """Return the points per method, in the order of the runs; points are sorted by share."""
    lines: dict[str, list[_Point]] = {}
    for run in runs:
        if share := _kept(run):
            lines.setdefault(_method(run), []).append(_Point(share, run.averages["flat_mean"].score or 0.0))
    return {method: sorted(points) for method, points in lines.items()}


def _kept(run: RunScore) -> float | None:
    return run.averages["flat_mean"].kept


def _method(run: RunScore) -> str:
    return run.run.identity.method or run.folder.name


def _draw_band(axis: Any, name: str, full: Average) -> tuple[Any, str]:
    """Draw the full cache's mean and interval. Returns a legend handle and label."""
    score = full.score or 0.0
    below, above = error_bar(score, full.stderr)
    band = axis.axhspan(score - below, score + above, color=REFERENCE, alpha=0.2, linewidth=0)
    return (band, axis.axhline(score, color=REFERENCE)), f"{shorten(name, 24)}, 95% interval"


def _caption(mean: Average, full: Sequence[tuple[str, RunScore]]) -> Iterator[str]:
    yield f"Mean score of {mean.datasets} datasets ({mean.n} rows) against the share of past tokens attended to."
    if full:
        yield f"The band is the 95% interval of the score of {full[0][0]}."
    if full[1:]:
        yield f"Not shown, because they report no kept share: {', '.join(name for name, _ in full[1:])}."
