"""Matches the rows of several runs, and bootstraps their paired differences."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy
from numpy.typing import NDArray

from sparsecache.errors import UsageError, listed
from sparsecache.longbench.row_ids import matched_by_order_notes, with_row_ids
from sparsecache.longbench.runs import run_names
from sparsecache.longbench.score_types import DatasetScore, RunScore
from sparsecache.longbench.subjects import data_options

RESAMPLES = 10_000
MIN_ROWS = 20  # fewer rows get no interval, since it would be too narrow
_MAX_NAMED = 3  # datasets of a run, and runs, in a message
_MAX_DRAWS = 2**22  # held in memory at once

Floats = NDArray[numpy.float64]


@dataclass(frozen=True)
class CommonRows:
    """Runs reduced to their common rows, in the order of their `_id`s, so that the order of files changes no interval.

    left_out: number of rows left out per run, including those that cannot be matched and of datasets that another run
    lacks. matched_by_order: file stems of datasets whose rows have no `_id` in some run (`row_ids`).
    """

    runs: list[RunScore]
    left_out: list[int]
    matched_by_order: Sequence[str] = ()


def common_rows(runs: Sequence[RunScore]) -> CommonRows:
    """Return the rows of every dataset that all runs have, matched by `_id`, or by order (`row_ids`).

    Raises UsageError if there are none, if a file repeats an `_id`, or if rows with the same `_id` have different
    answers.
    """
    names = run_names(runs)
    runs, by_order = with_row_ids(runs)
    tables = [
        {dataset.task.name: _by_id(dataset, name) for dataset in run.datasets}
        for run, name in zip(runs, names, strict=True)
    ]
    ids = {
        name: sorted(row_id for row_id in rows if all(row_id in table.get(name, ()) for table in tables))
        for name, rows in tables[0].items()
    }
    if not any(ids.values()):
        different = [run for run, table in zip(runs[1:], tables[1:], strict=True) if not _share_rows(tables[0], table)]
        contents = listed(_contents([runs[0], *(different or runs[1:])]), 1 + _MAX_NAMED, whole=True)
        raise UsageError(
            f"{contents} have no rows in common. Rows are matched by dataset and `_id`; rows without an `_id` by their "
            f"order, if number of rows, answers and lengths agree. Predict the same data in every run."
        )
    reduced = [
        replace(run, datasets=[_only(dataset, table[dataset.task.name], ids) for dataset in _ordered(run, ids)])
        for run, table in zip(runs, tables, strict=True)
    ]
    for other, name in zip(reduced[1:], names[1:], strict=True):
        _check_answers(reduced[0], other, names[0], name)
    left_out = [before.num_rows - after.num_rows for before, after in zip(runs, reduced, strict=True)]
    return CommonRows(reduced, left_out, by_order)


def _share_rows(first: Mapping[str, Mapping[str, int]], second: Mapping[str, Mapping[str, int]]) -> bool:
    return any(not rows.keys().isdisjoint(second.get(name, ())) for name, rows in first.items())


def _contents(runs: Sequence[RunScore]) -> Iterator[str]:
    """Yield the folder of each run with its datasets, and with those options of its data that differ."""
    options = [data_options(run) for run in runs]
    for run, of_run in zip(runs, options, strict=True):
        stems = [dataset.task.file_stem(run.e) for dataset in run.datasets if dataset.rows]
        names = f": {', '.join(stems)}" if 0 < len(stems) <= _MAX_NAMED else ""
        datasets = f"{len(stems)} dataset{'s' * (len(stems) != 1)}{names}"
        differ = [
            f"{key} {value}" for key, value in of_run.items() if any(value != other.get(key) for other in options)
        ]
        yield f"{run.folder} ({'; '.join([datasets, *differ])})"


def common_rows_or_all(runs: Sequence[RunScore]) -> CommonRows:
    """Return `common_rows` of several runs. A single run keeps all of its rows."""
    return common_rows(runs) if len(runs) > 1 else CommonRows(list(runs), [0])


def common_rows_notes(runs: Sequence[RunScore], common: CommonRows) -> Iterator[str]:
    """Yield notes on rows that were matched by order or left out, and on incomplete runs."""
    names = run_names(runs)
    yield from matched_by_order_notes(common.matched_by_order)
    left = [
        f"{left_out} of {run.num_rows} rows of {name}"
        for run, name, left_out in zip(runs, names, common.left_out, strict=True)
        if left_out
    ]
    if left:
        yield (
            f"Compared on the {common.runs[0].num_rows} rows that all runs have (same dataset and _id). Left out: "
            f"{listed(left, whole=True)}."
        )
    partial = [name for run, name in zip(runs, names, strict=True) if not run.complete]
    if partial:
        yield f"INCOMPLETE: {listed(partial, whole=True)}. Score each run separately to see the missing rows."


def failed_rows_notes(runs: Sequence[RunScore]) -> Iterator[str]:
    """Yield a note on each run with failed rows. runs: as `common_rows` gives them."""
    for run, name in zip(runs, run_names(runs), strict=True):
        if run.num_failed:
            yield f"{run.num_failed} of these rows failed in {name} and count 0.0. Predict again to retry them."


def few_rows_notes(run: RunScore) -> Iterator[str]:
    """Yield a note on the datasets of a run that have too few rows for intervals, if there are any."""
    few = [dataset.task.file_stem(dataset.e) for dataset in run.datasets if len(dataset.rows) < MIN_ROWS]
    if few:
        names = "all datasets" if len(few) == len(run.datasets) else ", ".join(few)
        yield (
            f"Too few rows for reliable intervals: fewer than {MIN_ROWS} in {names}. Intervals of means over them, if "
            f"any, are too narrow."
        )


def bootstrap_means(values: Floats, name: str, seed: int, resamples: int = RESAMPLES) -> Floats:
    """Return means over rows drawn with replacement: `values` [rows, runs] -> [resamples, runs].

    The draws depend only on the seed, the dataset `name` and the number of rows, so they are the same for every run.
    """
    rows = len(values)
    generator = numpy.random.default_rng([seed, crc32(name.encode())])
    means = []
    for count in _batches(resamples, max(1, _MAX_DRAWS // rows)):
        drawn = generator.integers(rows, size=(count, rows))
        means.append(numpy.stack([column[drawn].mean(axis=1) for column in values.T], axis=1))
    return numpy.concatenate(means)


def confidence_interval(means: Floats) -> tuple[float, float]:
    """Return the 95 % percentile interval of bootstrap means. It is too narrow below MIN_ROWS rows."""
    low, high = numpy.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _batches(total: int, size: int) -> Iterator[int]:
    while total > 0:
        yield min(size, total)
        total -= size


def _by_id(dataset: DatasetScore, name: str) -> dict[str, int]:
    """Return the position of each row with an `_id`."""
    ids = [str(record["_id"]) if record.get("_id") is not None else None for record in dataset.records]
    places = {row_id: at for at, row_id in enumerate(ids) if row_id is not None}
    if len(places) < len(ids) - ids.count(None):
        raise UsageError(
            f"{dataset.task.name} of {name} repeats _ids, so its rows cannot be matched. Delete the repeats."
        )
    return places


def _ordered(run: RunScore, ids: dict[str, list[str]]) -> list[DatasetScore]:
    """Return the datasets with common rows, in the order of the first run."""
    found = {dataset.task.name: dataset for dataset in run.datasets}
    return [found[name] for name, rows in ids.items() if rows]


def _only(dataset: DatasetScore, places: dict[str, int], ids: dict[str, list[str]]) -> DatasetScore:
    return dataset.only([places[row_id] for row_id in ids[dataset.task.name]])


def _check_answers(first: RunScore, other: RunScore, name: str, other_name: str) -> None:
    for one, two in zip(first.datasets, other.datasets, strict=True):
        for mine, theirs in zip(one.records, two.records, strict=True):
            if mine["answers"] != theirs["answers"]:
                raise UsageError(
                    f"Row {mine['_id']} of {one.task.name} has different answers in {name} and {other_name}, so the "
                    f"runs used different data. Predict the same data in every run."
                )
