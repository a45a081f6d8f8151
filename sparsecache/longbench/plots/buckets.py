"""Scores by length, for LongBench-E: means over datasets per bucket, with 95 % intervals."""

import math
from collections.abc import Sequence

from sparsecache.errors import UsageError
from sparsecache.longbench.paired import MIN_ROWS
from sparsecache.longbench.plots._axes import MAX_RUNS, error_bar, legend_above, run_labels
from sparsecache.longbench.plots._figure import Plot, line_style, new_figure, run_colors, with_style
from sparsecache.longbench.score_types import BUCKETS, RunScore
from sparsecache.longbench.subjects import subject

_OFFSET = 0.06  # between two runs, as a share of the distance between two buckets; keeps their error bars apart


@with_style
def draw(runs: Sequence[RunScore]) -> Plot:
    """Return the plot.

    Raises UsageError for more than MAX_RUNS runs, for LongBench, and if no row has a length.
    """
    names = run_labels(runs, MAX_RUNS)
    if not all(run.e for run in runs):
        raise UsageError("Only LongBench-E has length buckets. Add --e for LongBench-E runs, or use another --kind.")
    figure, axis = new_figure(2.2)
    handles = []
    for number, (run, color) in enumerate(zip(runs, run_colors(len(runs)), strict=True)):
        means = [(at, *mean) for at, name in enumerate(BUCKETS) if (mean := bucket_mean(run, name))]
        if not means:
            raise UsageError(
                f"No row of {run.folder} has a length, so its length buckets are empty. Use another --kind."
            )
        positions = [at + _OFFSET * (number - (len(runs) - 1) / 2) for at, *_ in means]
        scores = [score for _, score, *_ in means]
        errors = list(zip(*(error_bar(score, stderr, rows) for _, score, stderr, rows in means), strict=True))
        style = line_style(number) | {"color": color, "markerfacecolor": color}
        handles.append(axis.errorbar(positions, scores, yerr=errors, elinewidth=0.6, clip_on=False, **style))
    axis.set_xticks(range(len(BUCKETS)), BUCKETS)
    axis.set_xlim(-0.5, len(BUCKETS) - 0.5)
    axis.set_ylim(0, 100)
    axis.grid(axis="y")
    axis.set_xlabel("length of the text, words")
    axis.set_ylabel("mean score")
    if len(runs) > 1:
        legend_above(figure, handles, names)
    caption = (
        f"Mean score by length of {', '.join(names)}, over the datasets with rows of that length; 95% intervals, where "
        f"there are {MIN_ROWS} rows or more."
    )
    return Plot(f"Scores by length: {subject(runs)}", caption, figure)


def bucket_mean(run: RunScore, name: str) -> tuple[float, float | None, int] | None:
    """Return the mean over datasets in one bucket, its standard error and its rows; None if empty."""
    parts = [part for dataset in run.datasets if (part := dataset.buckets[name]).n]
    if not parts:
        return None
    errors = [part.stderr for part in parts if part.stderr is not None]
    stderr = math.hypot(*errors) / len(parts) if len(errors) == len(parts) else None
    return sum(part.score or 0.0 for part in parts) / len(parts), stderr, sum(part.n for part in parts)
