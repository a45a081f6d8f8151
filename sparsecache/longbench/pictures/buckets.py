"""Scores by length, for LongBench-E: the mean over datasets in each length bucket, with 95 % intervals."""

import math
from collections.abc import Sequence

from sparsecache.errors import UsageError
from sparsecache.longbench.pictures._axes import error_95, few_names_of, legend_above
from sparsecache.longbench.pictures._canvas import Picture, colours, figure, in_style, pen
from sparsecache.longbench.scores import BUCKETS, RunScore

_APART = 0.06  # of the way between two buckets: runs stand beside each other, so that intervals do not cover


@in_style
def draw(runs: Sequence[RunScore]) -> Picture:
    """The picture. Raises UsageError for more runs than fit, for LongBench, or where no row has a length."""
    names = few_names_of(runs)
    if not all(run.e for run in runs):
        raise UsageError("Length buckets are LongBench-E's. Give --e with runs of LongBench-E, or another --kind.")
    sheet, axis = figure(2.2)
    handles = []
    for number, (run, colour) in enumerate(zip(runs, colours(len(runs)), strict=True)):
        means = [(at, *mean) for at, name in enumerate(BUCKETS) if (mean := bucket_mean(run, name))]
        if not means:
            raise UsageError(
                f"No row of {run.folder} has a length, so none is in a length bucket. Give another --kind."
            )
        places = [at + _APART * (number - (len(runs) - 1) / 2) for at, *_ in means]
        scores = [score for _, score, _ in means]
        errors = list(zip(*(error_95(score, stderr) for _, score, stderr in means), strict=True))
        looks = pen(number) | {"color": colour}
        handles.append(axis.errorbar(places, scores, yerr=errors, elinewidth=0.6, clip_on=False, **looks))
    axis.set_xticks(range(len(BUCKETS)), BUCKETS)
    axis.set_xlim(-0.5, len(BUCKETS) - 0.5)
    axis.set_ylim(0, 100)
    axis.grid(axis="y")
    axis.set_xlabel("length of the text, words")
    axis.set_ylabel("mean score")
    if len(runs) > 1:
        legend_above(sheet, handles, names)
    caption = f"Mean score by length of {', '.join(names)}, over the datasets with rows of that length; 95% intervals."
    return Picture("Scores by length", caption, sheet)


def bucket_mean(run: RunScore, name: str) -> tuple[float, float | None] | None:
    """The mean of the datasets' means in one bucket, and its standard error; None without rows of that length."""
    parts = [part for dataset in run.datasets if (part := dataset.buckets[name]).n]
    if not parts:
        return None
    errors = [part.stderr for part in parts if part.stderr is not None]
    stderr = math.hypot(*errors) / len(parts) if len(errors) == len(parts) else None
    return sum(part.score or 0.0 for part in parts) / len(parts), stderr
