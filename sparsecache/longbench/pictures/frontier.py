"""Score against kept share, as a sweep shows it: a line per method, the full cache as a band."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sparsecache.errors import UsageError
from sparsecache.longbench.pictures._axes import error_95, legend_above, mean_axis, names_of, share_axis, short
from sparsecache.longbench.pictures._canvas import REFERENCE, Picture, figure, in_style, pen
from sparsecache.longbench.scores import Average, RunScore


class _Point(NamedTuple):
    share: float
    score: float


@in_style
def draw(runs: Sequence[RunScore]) -> Picture:
    """The picture: means over datasets, the kept share on a logarithmic axis, a 95 % band of the full cache's mean.

    The full cache is a run without a kept share, `vanilla` if there is one. Raises UsageError where no run reports a
    kept share, where no dataset is part of LongBench and so there is no mean, or for one run alone.
    """
    if len(runs) < 2:
        raise UsageError("One run is one point. Name several, the full cache among them, or give another --kind.")
    lines = _lines(runs)
    if not lines:
        raise UsageError(
            "No run says what it kept in datasets of LongBench, so there is no kept share to draw scores against. "
            "Name runs of sparse methods, or give another --kind."
        )
    full = [(name, run) for name, run in zip(names_of(runs), runs, strict=True) if _kept(run) is None]
    full.sort(key=lambda named: _method(named[1]) != "vanilla")
    sheet, axis = figure(2.5)
    share_axis(axis, [point.share for points in lines.values() for point in points])
    legend = [_band(axis, name, run.averages["flat_mean"]) for name, run in full[:1]]
    for number, (method, points) in enumerate(lines.items()):
        (line,) = axis.plot(*zip(*points, strict=True), clip_on=False, zorder=3, **pen(number))
        legend.append((line, short(method, 24)))
    mean_axis(axis)
    axis.set_xlabel("kept share of past tokens")
    axis.set_ylabel("mean score")
    legend_above(sheet, *zip(*legend, strict=True))
    return Picture("Score against kept share", " ".join(_caption(runs[0].averages["flat_mean"], full)), sheet)


def _lines(runs: Sequence[RunScore]) -> dict[str, list[_Point]]:
    """By method in the runs' order; within a method from the smallest share on."""
    lines: dict[str, list[_Point]] = {}
    for run in runs:
        if share := _kept(run):
            lines.setdefault(_method(run), []).append(_Point(share, run.averages["flat_mean"].score or 0.0))
    return {method: sorted(points) for method, points in lines.items()}


def _kept(run: RunScore) -> float | None:
    return run.averages["flat_mean"].kept


def _method(run: RunScore) -> str:
    return run.run.identity.method or run.folder.name


def _band(axis: Any, name: str, full: Average) -> tuple[Any, str]:
    score = full.score or 0.0
    below, above = error_95(score, full.stderr)
    band = axis.axhspan(score - below, score + above, color=REFERENCE, alpha=0.2, linewidth=0)
    return (band, axis.axhline(score, color=REFERENCE)), f"{short(name, 24)}, 95% interval"


def _caption(mean: Average, full: Sequence[tuple[str, RunScore]]) -> Iterator[str]:
    yield f"Mean score of {mean.datasets} datasets ({mean.n} rows) against the share of past tokens attended to."
    if full:
        yield f"The band is the 95% interval of {full[0][0]}'s own score."
    if full[1:]:
        yield f"Not drawn, since they report no share: {', '.join(name for name, _ in full[1:])}."
