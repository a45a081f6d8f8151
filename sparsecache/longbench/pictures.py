"""What runs look like: scores by dataset, scores against the kept share, by length, and where the time goes.

Made for a column of a paper. Runs are told apart by place, marker or dashes too, never by colour alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparsecache.errors import UsageError
from sparsecache.longbench.axes import label_points, legend_above, score_axis, share_axis, short
from sparsecache.longbench.canvas import (
    COLUMN,
    DASHES,
    INK,
    MARKERS,
    MUTED,
    REFERENCE,
    SERIES,
    Picture,
    drawn,
    figure,
)
from sparsecache.longbench.comparison import ComparedRun, Comparison, Entry
from sparsecache.longbench.paired import common_rows
from sparsecache.longbench.runs import short_names
from sparsecache.longbench.scores import BUCKETS, RunScore
from sparsecache.longbench.sessions import clock
from sparsecache.longbench.tasks import load_tasks

MOST_RUNS = 8  # beside each other; more of them are a sweep
SURE = 1.96  # standard errors to each side of a score: 95 %
_BAR = 0.095  # inches


@dataclass(frozen=True)
class _Scored:
    """A score in percent and its standard error, None where one row says nothing of it."""

    score: float
    stderr: float | None

    @property
    def interval(self) -> tuple[float, float]:
        """What a score may be, within 0 to 100."""
        error = SURE * (self.stderr or 0.0)
        return max(0.0, self.score - error), min(100.0, self.score + error)


@dataclass(frozen=True)
class _Group:
    """Lines of a picture below one heading: a name and a score for each run."""

    heading: str
    lines: list[tuple[str, list[_Scored]]]


def bars(comparison: Comparison) -> Picture:
    """Bars per dataset with 95 % intervals, grouped by category, runs side by side.

    Raises UsageError for more than MOST_RUNS runs.
    """
    categories = {task.file_stem(comparison.e): task.category for task in load_tasks().values()}
    lines = [
        (categories[line.name] if line.kind == "dataset" else "", line.name, [*map(_scored, line.entries)])
        for line in comparison.lines
        if line.kind == "dataset" or line.name == "flat_mean"
    ]
    return _bars(lines, [run.name for run in comparison.runs])


def score_bars(run: RunScore) -> Picture:
    """The same of one run."""
    lines = [
        (dataset.task.category, dataset.task.file_stem(run.e), [_Scored(score, dataset.summary.stderr)])
        for dataset in run.datasets
        if (score := dataset.summary.score) is not None
    ]
    mean = run.averages["flat_mean"]
    if mean.score is not None:
        lines.append(("", "flat_mean", [_Scored(mean.score, mean.stderr)]))
    return _bars(lines, [run.folder.name])


@drawn
def _bars(lines: Sequence[tuple[str, str, list[_Scored]]], names: Sequence[str]) -> Picture:
    _check_number(names, "bars")
    sheet, axis = figure(0)
    colours = _colours(len(names))
    headings, places, labels = [], [], []
    at = 0.0
    for number, (heading, name, scored) in enumerate(lines):
        if not number or heading != lines[number - 1][0]:
            at += _BAR * (1.5 if heading else 0.8)
            headings.append((at - 0.5 * _BAR, heading.replace("_", " ")))
        middle = at + _BAR * len(names) / 2
        ...
    return Picture("", "", sheet)
