"""Each method has a panel with the points of the frontier."""

from collections.abc import Callable

import pytest

from sparsecache.errors import UsageError
from sparsecache.longbench.plots._figure import RULE, SERIES
from sparsecache.longbench.score_types import RunScore
from tests.longbench.plots.drawing import draw


def test_methods_have_a_panel_each_with_the_points_of_the_frontier(scored: Callable[..., RunScore]) -> None:
    runs = [scored("full", qasper="yy")]
    for number, method in enumerate("abcdefg"):
        runs += [scored(f"{method}{kept}", method, kept + number / 100, qasper="yn") for kept in (0.1, 0.2)]
    plot = draw("methods", *runs)
    panels = plot.figure.axes
    assert [panel.get_title() for panel in panels] == list("abcdefg")
    assert plot.figure.get_supxlabel() == "kept share of past tokens in sparse layers"
    for number, panel in enumerate(panels):
        colored = [line for line in panel.lines if line.get_color() == SERIES[0] and len(line.get_xdata())]
        assert [list(line.get_xdata()) for line in colored] == [pytest.approx([0.1 + number / 100, 0.2 + number / 100])]
        assert sum(line.get_color() == RULE and len(line.get_xdata()) > 0 for line in panel.lines) == 6
    with pytest.raises(UsageError, match="needs 3 methods or more"):
        draw("methods", *runs[:5])
