"""Draws plots of runs, and reads labels and error bars of a plot."""

from typing import Any

import numpy

from sparsecache.longbench.paired import common_rows_or_all
from sparsecache.longbench.plots import get_plot
from sparsecache.longbench.plots._figure import Plot
from sparsecache.longbench.score_types import RunScore


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
