"""Scores by dataset: bars with 95 % intervals, grouped by category, runs side by side, and the mean of all."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sparsecache.errors import UsageError
from sparsecache.longbench.pictures._axes import error_95, few_names_of, legend_above, name_axis
from sparsecache.longbench.pictures._canvas import INK, MUTED, Picture, colours, figure, in_style
from sparsecache.longbench.scores import Average, RunScore, as_average

_GROUP, _THINNEST, _GAP, _HEADING = 0.17, 0.055, 0.07, 0.16  # inches


@dataclass(frozen=True)
class _Line:
    """What stands side by side: its name, the heading it belongs below, and every run's mean."""

    name: str
    heading: str
    means: list[Average]


@in_style
def draw(runs: Sequence[RunScore]) -> Picture:
    """The picture. Raises UsageError for more runs than fit, or where there is no row."""
    names = few_names_of(runs)
    lines = list(_lines(runs))
    if not lines:
        raise UsageError(f"{', '.join(names)}: no row, so there is no score to draw. Predict first.")
    bar = max(_THINNEST, _GROUP / len(runs))
    starts, headings, end = _places(lines, bar * len(runs))
    sheet, axis = figure(end + 0.45 + (0.14 * len(runs) if len(runs) > 1 else 0))
    handles = []
    for at, colour in enumerate(colours(len(runs))):
        places = [start + (at + 0.5) * bar for start in starts]
        scores = [line.means[at].score or 0.0 for line in lines]
        errors = [error_95(score, line.means[at].stderr) for score, line in zip(scores, lines, strict=True)]
        handles.append(axis.barh(places, scores, 0.86 * bar, color=colour))
        axis.errorbar(
            scores, places, xerr=list(zip(*errors, strict=True)), fmt="none", ecolor=INK, elinewidth=0.6, clip_on=False
        )
    for place, heading in headings:
        axis.text(1.2, place, heading, color=MUTED, va="center")
    name_axis(axis, [start + bar * len(runs) / 2 for start in starts], [line.name for line in lines], 0, end)
    axis.set_xlim(0, 100)
    axis.set_xticks(range(0, 101, 20))
    axis.grid(axis="x")
    axis.set_xlabel("score")
    if len(runs) > 1:
        legend_above(sheet, handles, names)
    caption = f"Score by dataset of {', '.join(names)}; lines are 95% intervals (1.96 standard errors)."
    return Picture("Scores by dataset", caption, sheet)


def _lines(runs: Sequence[RunScore]) -> Iterator[_Line]:
    for parts in zip(*(run.datasets for run in runs), strict=True):
        if parts[0].rows:
            task = parts[0].task
            yield _Line(task.file_stem(runs[0].e), task.category, [as_average(part) for part in parts])
    means = [run.averages["flat_mean"] for run in runs]
    if means[0].datasets > 1:
        yield _Line("mean", f"{means[0].datasets} datasets", means)


def _places(lines: Sequence[_Line], height: float) -> tuple[list[float], list[tuple[float, str]], float]:
    """Where each group of bars begins, where each heading stands, and where everything ends, in inches from the top."""
    starts: list[float] = []
    headings: list[tuple[float, str]] = []
    at = 0.0
    for number, line in enumerate(lines):
        if not number or line.heading != lines[number - 1].heading:
            headings.append((at + _HEADING / 2, line.heading.replace("_", " ")))
            at += _HEADING
        starts.append(at)
        at += height + _GAP
    return starts, headings, at
