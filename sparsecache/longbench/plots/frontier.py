"""Score against kept share, for sweeps: a line per method and group of options, and the full cache as a line."""

from collections.abc import Sequence
from typing import Any

from sparsecache.longbench.plots._axes import (
    KEPT_LABEL,
    label_points,
    legend_above,
    legend_beside,
    set_score_axis,
    set_share_axis,
    shorten,
)
from sparsecache.longbench.plots._figure import COLUMN, PAGE, REFERENCE, Plot, line_style, new_figure, with_style
from sparsecache.longbench.plots._lines import MEAN_NAMES, Point, Sweep, make_sweep
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.subjects import subject

_MOST_ABOVE = 8  # lines in a legend above the axes; with more, the plot is as wide as a page
_LEGEND_ROWS, _ROW_HEIGHT = 30, 0.155  # inches


@with_style
def draw(runs: Sequence[RunScore]) -> Plot:
    """Return the plot of mean scores over datasets against kept shares, on a logarithmic axis.

    The benchmarks of MEANS have an axis each, as far as the runs have them. The full cache is a run without a kept
    share, `vanilla` if it is among them. Error bars are 95 % intervals of the paired difference to it. Points have a
    label if their run has one, and the value of the swept option if there are few or the option is not the budget.

    Raises UsageError for a single run, and if no run reports a kept share.
    """
    found = make_sweep(runs)
    means, lines = found.means, found.lines
    beside = len(lines) > _MOST_ABOVE
    rows = min(_LEGEND_ROWS, len(lines) + 1)
    height = max(3.0, rows * _ROW_HEIGHT + 0.4) if beside else 2.5
    figure, axes = new_figure(height, len(means), PAGE if beside or len(means) > 1 else COLUMN, squeeze=False)
    for axis, mean in zip(axes[0], means, strict=True):
        handles = [draw_full(axis, found, mean)] if found.full else []
        handles += [
            draw_line(axis, points.get(mean, ()), line_style(line.method, line.group)) for line, points in lines.items()
        ]
        set_share_axis(axis, found.shares(mean))
        set_score_axis(axis, found.scores(mean))
        axis.set_xlabel(KEPT_LABEL if len(means) < 3 else KEPT_LABEL.replace(" in ", "\nin "))
        if len(means) > 1:
            axis.set_title(MEAN_NAMES[mean])
    axes[0][0].set_ylabel("mean score")
    texts = [found.full_name] if found.full else []
    texts += [shorten(line.name, 40) for line in lines]
    if beside:
        legend_beside(figure, handles, texts, _LEGEND_ROWS)
    else:
        legend_above(figure, handles, texts)
    figure.draw_without_rendering()  # lays it out
    for axis, mean in zip(axes[0], means, strict=True):
        label_points(axis, found.texts(mean))
    return Plot(f"Score against kept share: {subject(runs)}", found.caption, figure)


def draw_full(axis: Any, found: Sweep, mean: str) -> Any:
    """Draw the score of the full cache as a line."""
    assert found.full is not None
    return axis.axhline(found.full.averages[mean].score or 0.0, color=REFERENCE, linewidth=1.0)


def draw_line(axis: Any, points: Sequence[Point], style: dict[str, Any]) -> Any:
    """Draw points in order of their share, with error bars. Returns the line."""
    points = sorted(points)
    shares, scores = [point.share for point in points], [point.score for point in points]
    if any(point.below or point.above for point in points):
        reach = [[point.below for point in points], [point.above for point in points]]
        axis.errorbar(shares, scores, reach, fmt="none", ecolor=style["color"], elinewidth=0.5, alpha=0.5)
    (line,) = axis.plot(shares, scores, clip_on=False, zorder=3, **style)
    return line
