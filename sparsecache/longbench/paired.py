"""The same rows of several runs, and what their paired differences are worth. Knows nothing of prompts or methods."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy
from numpy.typing import NDArray

from sparsecache.errors import UsageError
from sparsecache.longbench.kept import kept_of
from sparsecache.longbench.runs import short_names
from sparsecache.longbench.scores import DatasetScore, RunScore

RESAMPLES = 10_000
_AT_ONCE = 2**22  # draws held in memory

Floats = NDArray[numpy.float64]


@dataclass(frozen=True)
class Common:
    """The runs cut down to the rows that all of them have, in the first run's order, and what was left out of each.

    left_out: rows per run, those without an `_id` and those of datasets that another run lacks among them.
    """

    runs: list[RunScore]
    left_out: list[int]


def common_rows(runs: Sequence[RunScore]) -> Common:
    """Finds the rows of every dataset that all runs have, by `_id`.

    Raises UsageError if there are none, if a file repeats an `_id`, or if rows of one `_id` have other answers and so
    are not the same row.
    """
    names = short_names([run.folder for run in runs])
    tables = [
        {dataset.task.name: _by_id(dataset, name) for dataset in run.datasets}
        for run, name in zip(runs, names, strict=True)
    ]
    ids = {
        name: [row_id for row_id in rows if all(row_id in table.get(name, ()) for table in tables)]
        for name, rows in tables[0].items()
    }
    if not any(ids.values()):
        raise UsageError(
            f"{', '.join(str(run.folder) for run in runs)} have no row in common: rows are the same if their dataset "
            f"and `_id` are, and rows without an `_id` cannot be matched. Predict the same data with each."
        )
    cut = [
        replace(run, datasets=[_only(dataset, table[dataset.task.name], ids) for dataset in _ordered(run, ids)])
        for run, table in zip(runs, tables, strict=True)
    ]
    for other, name in zip(cut[1:], names[1:], strict=True):
        _check_answers(cut[0], other, names[0], name)
    left_out = [_rows(before) - _rows(after) for before, after in zip(runs, cut, strict=True)]
    return Common(cut, left_out)


def same_rows(runs: Sequence[RunScore]) -> Common:
    """common_rows of several runs; one run stands as it is, rows without an `_id` among them."""
    return common_rows(runs) if len(runs) > 1 else Common(list(runs), [0])


def remarks(runs: Sequence[RunScore], common: Common) -> Iterator[str]:
    """What a reader of anything over common rows must know first: what was left out, and which runs are partial."""
    names = short_names([run.folder for run in runs])
    left = [
        f"{left_out} of {_rows(run)} rows of {name}"
        for run, name, left_out in zip(runs, names, common.left_out, strict=True)
        if left_out
    ]
    if left:
        yield (
            f"Compared on the {_rows(common.runs[0])} rows that all runs have (same dataset, same _id); left out: "
            f"{', '.join(left)}."
        )
    partial = [name for run, name in zip(runs, names, strict=True) if not run.complete]
    if partial:
        yield f"INCOMPLETE: {', '.join(partial)}; score them alone to see what is missing."


def resampled_means(values: Floats, name: str, seed: int, resamples: int = RESAMPLES) -> Floats:
    """Means over rows drawn with replacement: `values` [rows, runs] -> [resamples, runs].

    The draws depend on seed, dataset and number of rows alone, so every run of a dataset is drawn alike.
    """
    rows = len(values)
    generator = numpy.random.default_rng([seed, crc32(name.encode())])
    means = []
    for count in _portions(resamples, max(1, _AT_ONCE // rows)):
        drawn = generator.integers(rows, size=(count, rows))
        means.append(numpy.stack([column[drawn].mean(axis=1) for column in values.T], axis=1))
    return numpy.concatenate(means)


def interval(means: Floats) -> tuple[float, float]:
    """The middle 95 % of resampled means (percentile bootstrap; too narrow for a handful of rows)."""
    low, high = numpy.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _portions(total: int, most: int) -> Iterator[int]:
    while total > 0:
        yield min(most, total)
        total -= most


def _by_id(dataset: DatasetScore, name: str) -> dict[str, int]:
    """Where each row with an `_id` stands."""
    ids = [str(record["_id"]) if record.get("_id") is not None else None for record in dataset.records]
    places = {row_id: at for at, row_id in enumerate(ids) if row_id is not None}
    if len(places) < len(ids) - ids.count(None):
        raise UsageError(f"{dataset.task.name} of {name} repeats _ids, so its rows cannot be matched. Delete them.")
    return places


def _ordered(run: RunScore, ids: dict[str, list[str]]) -> list[DatasetScore]:
    """The datasets with common rows, in the first run's order."""
    found = {dataset.task.name: dataset for dataset in run.datasets}
    return [found[name] for name, rows in ids.items() if rows]


def _only(dataset: DatasetScore, places: dict[str, int], ids: dict[str, list[str]]) -> DatasetScore:
    at = [places[row_id] for row_id in ids[dataset.task.name]]
    records = [dataset.records[place] for place in at]
    rows = [dataset.rows[place] for place in at]
    return replace(
        dataset, rows=rows, records=records, expected=len(rows), warnings=[], kept=kept_of(records), rouge_score=None
    )


def _check_answers(first: RunScore, other: RunScore, name: str, other_name: str) -> None:
    for one, two in zip(first.datasets, other.datasets, strict=True):
        for mine, theirs in zip(one.records, two.records, strict=True):
            if mine["answers"] != theirs["answers"]:
                raise UsageError(
                    f"Row {mine['_id']} of {one.task.name} has other answers in {name} than in {other_name}, so these "
                    f"are runs over different data. Predict the same data with each."
                )


def _rows(run: RunScore) -> int:
    return sum(len(dataset.rows) for dataset in run.datasets)
