"""Score against kept share in small panels, one per method: its lines in color, those of the other methods in gray."""

import math
from collections.abc import Sequence

from sparsecache.errors import UsageError
from sparsecache.longbench.plots._axes import (
    KEPT_LABEL,
    label_points,
    legend_above,
    set_score_axis,
    set_share_axis,
    shorten,
)
from sparsecache.longbench.plots._figure import PAGE, REFERENCE, RULE, SERIES, Plot, line_style, new_figure, with_style
from sparsecache.longbench.plots._lines import make_sweep
from sparsecache.longbench.plots.frontier import draw_full, draw_line
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.subjects import subject

_FEWEST, _COLUMNS = 3, 5  # methods
_PANEL, _HEADING = 1.1, 0.75  # inches


@with_style
def draw(runs: Sequence[RunScore]) -> Plot:
    """Return the plot: the points and error bars of the frontier, over the first mean that the runs have.

    Raises UsageError as the frontier does, and for fewer than three methods.
    """
    found = make_sweep(runs)
    mean, methods = found.means[0], list(dict.fromkeys(line.method for line in found.lines))
    if len(methods) < _FEWEST:
        raise UsageError(
            f"This plot needs {_FEWEST} methods or more. Name runs of more methods, or use --kind frontier."
        )
    columns = min(_COLUMNS, len(methods))
    rows = math.ceil(len(methods) / columns)
    width = PAGE * columns / _COLUMNS
    figure, axes = new_figure(_PANEL * rows + _HEADING, columns, width, rows, sharex=True, sharey=True, squeeze=False)
    panels = list(axes.flat)
    for panel, method in zip(panels, methods, strict=False):
        own = {line: points[mean] for line, points in found.lines.items() if line.method == method and mean in points}
        for line, points in found.lines.items():
            if line not in own and mean in points:
                places = sorted((point.share, point.score) for point in points[mean])
                panel.plot(*zip(*places, strict=True), color=RULE, linewidth=0.6, zorder=1)
        if found.full:
            draw_full(panel, found, mean)
        for number, of_method in enumerate(own.values()):
            draw_line(panel, of_method, {**line_style(0, number), "markersize": 3})
        panel.set_title(shorten(next(iter(own)).name.partition(" ")[0], 24), fontsize=7)
    for panel in panels[len(methods) :]:
        panel.remove()
    set_share_axis(panels[0], found.shares(mean), narrow=True)
    set_score_axis(panels[0], found.scores(mean))
    for panel in panels:
        panel.grid(axis="y")
    figure.supxlabel(KEPT_LABEL, fontsize=7)
    figure.supylabel("mean score", fontsize=7)
    others = panels[0].plot([], [], color=RULE, linewidth=0.6)
    own_line = panels[0].plot([], [], color=SERIES[0], marker="o")
    full = panels[0].plot([], [], color=REFERENCE, linewidth=1.0) if found.full else []
    names = ["the method", "other methods", *([found.full_name] if found.full else [])]
    legend_above(figure, [*own_line, *others, *full], names)
    figure.draw_without_rendering()  # lays it out
    for panel, method in zip(panels, methods, strict=False):
        label_points(panel, found.texts(mean, method))
    return Plot(f"Methods: {subject(runs)}", found.caption, figure)
