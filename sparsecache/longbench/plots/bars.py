"""Scores by dataset: bars with 95 % intervals, runs side by side, and the mean."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sparsecache.errors import UsageError
from sparsecache.longbench.paired import MIN_ROWS
from sparsecache.longbench.plots._axes import MAX_RUNS, error_bar, label_y_axis, legend_above, run_labels
from sparsecache.longbench.plots._figure import INK, MUTED, Plot, new_figure, run_colors, with_style
from sparsecache.longbench.score_types import GROUP_NAMES, Average, RunScore, as_average
from sparsecache.longbench.subjects import subject

_GROUP_HEIGHT, _MIN_BAR, _GAP, _HEADING = 0.17, 0.055, 0.07, 0.16  # inches


@dataclass(frozen=True)
class _Group:
    """One group of bars: its label, the heading above it, and the mean of every run."""

    label: str
    heading: str
    means: list[Average]


@with_style
def draw(runs: Sequence[RunScore]) -> Plot:
    """Return the plot. Raises UsageError for more than MAX_RUNS runs, and if there is no row."""
    names = run_labels(runs, MAX_RUNS)
    groups = list(_groups(runs))
    if not groups:
        raise UsageError(f"{', '.join(names)}: there are no rows, so there is no score to plot. Predict first.")
    bar = max(_MIN_BAR, _GROUP_HEIGHT / len(runs))
    starts, headings, end = _layout(groups, bar * len(runs))
    figure, axis = new_figure(end + 0.45 + (0.14 * len(runs) if len(runs) > 1 else 0))
    handles = []
    for at, color in enumerate(run_colors(len(runs))):
        positions = [start + (at + 0.5) * bar for start in starts]
        scores = [group.means[at].score or 0.0 for group in groups]
        errors = [
            error_bar(score, group.means[at].stderr, group.means[at].n)
            for score, group in zip(scores, groups, strict=True)
        ]
        handles.append(axis.barh(positions, scores, 0.86 * bar, color=color))
        axis.errorbar(
            scores,
            positions,
            xerr=list(zip(*errors, strict=True)),
            fmt="none",
            ecolor=INK,
            elinewidth=0.6,
            clip_on=False,
        )
    for position, heading in headings:
        axis.text(1.2, position, heading, color=MUTED, va="center")
    label_y_axis(axis, [start + bar * len(runs) / 2 for start in starts], [group.label for group in groups], 0, end)
    axis.set_xlim(0, 100)
    axis.set_xticks(range(0, 101, 20))
    axis.grid(axis="x")
    axis.set_xlabel("score")
    if len(runs) > 1:
        legend_above(figure, handles, names)
    caption = (
        f"Score by dataset of {', '.join(names)}; lines are 95% intervals (1.96 standard errors), where there are "
        f"{MIN_ROWS} rows or more."
    )
    return Plot(f"Scores by dataset: {subject(runs)}", caption, figure)


def _groups(runs: Sequence[RunScore]) -> Iterator[_Group]:
    for parts in zip(*(run.datasets for run in runs), strict=True):
        if parts[0].rows:
            task = parts[0].task
            heading = task.category if task.group == "longbench" else GROUP_NAMES[task.group]
            yield _Group(task.file_stem(runs[0].e), heading, [as_average(part) for part in parts])
            for name, part in parts[0].strata.items():
                places = [at for at, row in enumerate(parts[0].rows) if name in row.strata]
                others = [each.only(places) for each in parts[1:]]
                yield _Group(name, heading, [as_average(each) for each in (part, *others)])
    for name, what in (("flat_mean", "datasets"), ("ruler", "RULER tasks"), ("own_mean", "own tasks")):
        means = [run.averages[name] for run in runs if name in run.averages]
        if means and means[0].datasets > 1:
            yield _Group("mean", f"{means[0].datasets} {what}", means)


def _layout(groups: Sequence[_Group], height: float) -> tuple[list[float], list[tuple[float, str]], float]:
    """Return the starts of groups, the headings with positions, and the end, in inches from the top."""
    starts: list[float] = []
    headings: list[tuple[float, str]] = []
    at = 0.0
    for number, group in enumerate(groups):
        if not number or group.heading != groups[number - 1].heading:
            headings.append((at + _HEADING / 2, group.heading.replace("_", " ")))
            at += _HEADING
        starts.append(at)
        at += height + _GAP
    return starts, headings, at
