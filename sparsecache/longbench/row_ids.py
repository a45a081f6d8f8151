"""Gives rows without an `_id` a key by their place in the file, so that files of other programs can be matched."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from sparsecache.longbench.score_types import DatasetScore, RunScore


def has_no_ids(dataset: DatasetScore) -> bool:
    """Return whether a dataset has rows and none of them has an `_id`."""
    return bool(dataset.records) and all(record.get("_id") is None for record in dataset.records)


def line_keys(dataset: DatasetScore) -> list[str]:
    """Return a key per row: its line, and a digest of its answers and its length."""
    return [f"line {line} {_digest(record)}" for line, record in enumerate(dataset.records, 1)]


def with_row_ids(runs: Sequence[RunScore]) -> tuple[list[RunScore], list[str]]:
    """Return the runs with an `_id` in every row that can be matched by order, and the file stems of these datasets.

    A dataset is matched by order if some run has it without `_id`s, and if all runs that have it agree in the number of
    rows, and in answers and length row by row. Its rows take the `_id`s of the first run that has them.
    """
    by_name: dict[str, list[DatasetScore]] = {}
    for run in runs:
        for dataset in run.datasets:
            by_name.setdefault(dataset.task.name, []).append(dataset)
    ids = {name: found for name, parts in by_name.items() if (found := _common_ids(parts)) is not None}
    if not ids:
        return list(runs), []
    stems = [parts[0].task.file_stem(parts[0].e) for name, parts in by_name.items() if name in ids]
    changed = [
        replace(run, datasets=[_with_ids(dataset, ids.get(dataset.task.name)) for dataset in run.datasets])
        for run in runs
    ]
    return changed, stems


def matched_by_order_notes(stems: Sequence[str]) -> Iterator[str]:
    """Yield a note on the datasets whose rows were matched by order, if there are any."""
    if stems:
        yield (
            f"Rows without an `_id` were matched by their order, because number of rows, answers and lengths agree: "
            f"{', '.join(stems)}."
        )


def _common_ids(parts: Sequence[DatasetScore]) -> list[str] | None:
    """Return the `_id`s that the rows of a dataset take in all runs; None if they are not matched by order."""
    if len(parts) < 2 or not any(map(has_no_ids, parts)):
        return None
    keys = line_keys(parts[0])
    if any(line_keys(part) != keys for part in parts[1:]):
        return None
    known = (part for part in parts if all(record.get("_id") is not None for record in part.records))
    return next(([str(record["_id"]) for record in part.records] for part in known), keys)


def _with_ids(dataset: DatasetScore, ids: Sequence[str] | None) -> DatasetScore:
    if ids is None or not has_no_ids(dataset):
        return dataset
    records = [{**record, "_id": key} for record, key in zip(dataset.records, ids, strict=True)]
    return replace(dataset, records=records)


def _digest(record: dict[str, Any]) -> str:
    text = json.dumps([record["answers"], record.get("length")])
    return hashlib.sha256(text.encode()).hexdigest()[:8]
