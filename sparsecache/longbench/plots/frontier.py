"""Score against kept share, for sweeps: a line per method and group of options, and the full cache as a line."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sparsecache.errors import UsageError
from sparsecache.longbench.compare import compare
from sparsecache.longbench.paired import MIN_ROWS
from sparsecache.longbench.plots._axes import (
    legend_above,
    legend_beside,
    run_labels,
    set_score_axis,
    set_share_axis,
    shorten,
)
from sparsecache.longbench.plots._figure import COLUMN, PAGE, REFERENCE, Plot, line_style, new_figure, with_style
from sparsecache.longbench.plots._lines import LineOf, sort_into_lines
from sparsecache.longbench.score_types import GROUP_NAMES, MEANS, Average, RunScore
from sparsecache.longbench.subjects import subject

_NAMES = {mean: GROUP_NAMES[group] for group, mean in MEANS.items()}
_MOST_ABOVE = 8  # lines in a legend above the axes; with more, the plot is as wide as a page
_MOST_LABELED = 16  # points
_LEGEND_ROWS, _ROW_HEIGHT = 30, 0.155  # inches


class _Point(NamedTuple):
    share: float
    score: float
    below: float
    above: float
    text: str


@with_style
def draw(runs: Sequence[RunScore]) -> Plot:
    """Return the plot of mean scores over datasets against kept shares, on a logarithmic axis.

    The benchmarks of MEANS have an axis each, as far as the runs have them. The full cache is a run without a kept
    share, `vanilla` if it is among them. Error bars are 95 % intervals of the paired difference to it. Points have a
    label if their run has one, and the value of the swept option if there are few or the option is not the budget.

    Raises UsageError for a single run, and if no run reports a kept share.
    """
    if len(runs) < 2:
        raise UsageError("This plot needs two runs or more. Name several, with the full cache, or use another --kind.")
    means = [mean for mean in MEANS.values() if any(_kept(run, mean) for run in runs)]
    if not means:
        raise UsageError(
            "No run reports a kept share for its datasets. Name runs of sparse methods, or use another --kind."
        )
    full = [run for run in runs if all(_kept(run, mean) is None for mean in means)]
    full.sort(key=lambda run: run.run.identity.method != "vanilla")
    sparse = [run for run in runs if any(_kept(run, mean) is not None for mean in means)]
    places = sort_into_lines(sparse)
    intervals = _intervals(full[0], sparse) if full else [dict[str, tuple[float, float]]() for _ in sparse]
    lines: dict[LineOf, dict[str, list[_Point]]] = {}
    for run, place, around in zip(sparse, places, intervals, strict=True):
        for mean in (mean for mean in means if _kept(run, mean)):
            text = run.label or (place.point if _is_labeled(place, len(sparse)) else "")
            point = _point(run.averages[mean], around.get(mean, (0.0, 0.0)), text)
            lines.setdefault(replace(place, point=""), {}).setdefault(mean, []).append(point)
    return _draw(runs, means, full, lines)


def _draw(
    runs: Sequence[RunScore],
    means: Sequence[str],
    full: Sequence[RunScore],
    lines: dict[LineOf, dict[str, list[_Point]]],
) -> Plot:
    names = dict(zip(map(id, runs), run_labels(runs), strict=True))
    beside = len(lines) > _MOST_ABOVE
    rows = min(_LEGEND_ROWS, len(lines) + 1)
    height = max(3.0, rows * _ROW_HEIGHT + 0.4) if beside else 2.5
    figure, axes = new_figure(height, len(means), PAGE if beside or len(means) > 1 else COLUMN, squeeze=False)
    for axis, mean in zip(axes[0], means, strict=True):
        points = [point for of_line in lines.values() for point in of_line.get(mean, ())]
        set_share_axis(axis, [point.share for point in points])
        handles, texts = [], []
        scores = [end for point in points for end in (point.score - point.below, point.score + point.above)]
        if full:
            score = full[0].averages[mean].score or 0.0
            handles.append(axis.axhline(score, color=REFERENCE, linewidth=1.0))
            texts.append(f"{shorten(names[id(full[0])], 24)} (full cache)")
            scores.append(score)
        for line, of_line in lines.items():
            handles.append(_draw_line(axis, sorted(of_line.get(mean, ())), line_style(line.method, line.group)))
            texts.append(shorten(line.name, 40))
        set_score_axis(axis, scores)
        axis.set_xlabel("kept share of past tokens")
        if len(means) > 1:
            axis.set_title(_NAMES[mean])
    axes[0][0].set_ylabel("mean score")
    if beside:
        legend_beside(figure, handles, texts, _LEGEND_ROWS)
    else:
        legend_above(figure, handles, texts)
    extents = [(_NAMES[mean] if len(means) > 1 else "", runs[0].averages[mean]) for mean in means]
    caption = _caption(extents, [names[id(run)] for run in full])
    return Plot(f"Score against kept share: {subject(runs)}", " ".join(caption), figure)


def _draw_line(axis: Any, points: Sequence[_Point], style: dict[str, Any]) -> Any:
    shares, scores = [point.share for point in points], [point.score for point in points]
    if any(point.below or point.above for point in points):
        reach = [[point.below for point in points], [point.above for point in points]]
        axis.errorbar(shares, scores, reach, fmt="none", ecolor=style["color"], elinewidth=0.5, alpha=0.5)
    for point in points:
        if point.text:
            axis.annotate(
                shorten(point.text), (point.share, point.score), (3, 3), textcoords="offset points", fontsize=6
            )
    (line,) = axis.plot(shares, scores, clip_on=False, zorder=3, **style)
    return line


def _point(mean: Average, around: tuple[float, float], text: str) -> _Point:
    return _Point(mean.kept or 0.0, mean.score or 0.0, *around, text)


def _is_labeled(place: LineOf, points: int) -> bool:
    return points <= _MOST_LABELED or "=" in place.point


def _intervals(full: RunScore, sparse: Sequence[RunScore]) -> list[dict[str, tuple[float, float]]]:
    """Return per run and mean how far the 95 % interval of its difference to the full cache reaches below and above."""
    groups = [group for group in compare([full, *sparse]).groups if group.kind == "average"]
    return [
        {
            group.name: (difference.mean - difference.interval[0], difference.interval[1] - difference.mean)
            for group in groups
            if (difference := group.entries[at].difference) and difference.interval
        }
        for at in range(1, len(sparse) + 1)
    ]


def _kept(run: RunScore, mean: str) -> float | None:
    return run.averages[mean].kept if mean in run.averages else None


def _caption(means: Sequence[tuple[str, Average]], full: Sequence[str]) -> Iterator[str]:
    parts = [f"{name + ': ' if name else ''}{mean.datasets} datasets ({mean.n} rows)" for name, mean in means]
    yield f"Mean score of {'; '.join(parts)} against the share of past tokens attended to."
    if full and any(mean.n >= MIN_ROWS for _, mean in means):
        yield f"Error bars are 95% intervals of the paired difference to {full[0]}."
    if full[1:]:
        yield f"Not shown, because they report no kept share: {', '.join(full[1:])}."
