"""All possible plots of some runs are drawn; impossible ones are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsecache.errors import UsageError
from sparsecache.longbench.paired import common_rows_or_all
from sparsecache.longbench.plots import draw_all, plot_kinds
from sparsecache.longbench.plots._axes import MAX_RUNS
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.scores import score_run
from tests.longbench.plots.drawing import draw

MakeRun = Callable[..., Path]


def test_draw_all_returns_every_possible_plot(sweep: list[RunScore], scored_by_length: Callable[..., RunScore]) -> None:
    assert plot_kinds() == ["bars", "buckets", "frontier", "methods", "time"]
    kinds = ["Scores by dataset", "Score against kept share", "Prefill and decode time"]
    titles = [f"{kind}: m on LongBench" for kind in kinds]
    assert [plot.title for plot in draw_all(common_rows_or_all(sweep).runs)] == titles
    alone = draw_all([scored_by_length("e", qasper=[("y", 10)])])
    assert [plot.title.partition(":")[0] for plot in alone] == [kinds[0], "Scores by length", kinds[2]]


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
