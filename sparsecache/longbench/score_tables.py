"""Formats the scores of one run as a table, with notes that qualify them."""

from collections.abc import Iterable, Iterator

from sparsecache.longbench.kept import format_kept, format_percent
from sparsecache.longbench.report import speed_lines, v2_result
from sparsecache.longbench.score_types import (
    BUCKETS,
    GROUP_NAMES,
    MEANS,
    STRATA,
    Average,
    DatasetScore,
    RunScore,
    Summary,
    as_average,
)
from sparsecache.longbench.tables import Cell, Document, Table, Value, number, records, words

AVERAGE_NAMES = {
    "avg_en": "Avg, English",
    "avg_zh": "Avg, Chinese",
    "avg_all": "Avg, all",
    "flat_mean": "mean of datasets",
    **{MEANS[group]: GROUP_NAMES[group] for group in ("longbench_v2", "longbench_v2_cot", "ruler")},
    "own_mean": "mean of own tasks",
}


def score_document(result: RunScore) -> Document:
    """Return the table of scores and its notes.

    The flat table has a row per dataset, category and average. With several lengths of RULER, a second table has its
    scores by task and length.
    """
    sparse = any(dataset.kept and dataset.kept.rows for dataset in result.datasets)
    means = [(name, mean) for name, mean in result.categories.items() if mean.datasets]
    averages = [(AVERAGE_NAMES[name], mean) for name, mean in result.averages.items() if mean.datasets]
    ends = any(dataset.num_ended_by_length is not None for dataset in result.datasets)
    header = ["dataset", "score", "±", "n", "of", *(["kept"] if sparse else []), *(["ended by length"] if ends else [])]
    rows = [_dataset_row(dataset, sparse, ends) for dataset in result.datasets]
    strata = [(name, part) for dataset in result.datasets for name, part in named_strata(dataset)]
    if strata:
        rows += [[], *(_dataset_row(part, sparse, ends, name) for name, part in strata)]
    for group in (means, averages):
        if group:
            rows += [[], *(_average_row(name, mean, sparse, ends) for name, mean in group)]
    if result.e:
        header += [text for name in BUCKETS for text in (name, "n")]
        rows = [row + [words("")] * (len(header) - len(row)) if row else row for row in rows]
    note = result.run.model.note
    return Document(
        tables=[Table("", header, rows), *_ruler_table(result)],
        records=records(str(result.folder), _records(result)),
        title=str(result.folder),
        preamble=[f"Note: {note}"] if note else [],
        notes=list(_notes(result)),
    )


def _ruler_table(result: RunScore) -> Iterator[Table]:
    """Yield the scores of RULER with a row per task and a column per length, if there are several lengths."""
    lengths = result.ruler_lengths
    if len(lengths) < 2:
        return
    scores: dict[str, dict[int, float | None]] = {}
    for dataset in result.datasets:
        if dataset.task.length is not None:
            scores.setdefault(dataset.task.base_name, {})[dataset.task.length] = dataset.summary.score
    rows = [
        [words(task), *(number(by_length.get(length), 2) for length in lengths)] for task, by_length in scores.items()
    ]
    means = [result.categories[f"ruler_{length}"] for length in lengths]
    yield Table(
        "RULER by length",
        ["task", *map(str, lengths)],
        [*rows, [], [words("mean"), *(number(mean.score, 2) for mean in means)]],
    )


def named_strata(dataset: DatasetScore) -> list[tuple[str, DatasetScore]]:
    """Return the parts of a dataset of LongBench v2 with their names in tables."""
    return [(f"{dataset.task.file_stem(dataset.e)} {name}", part) for name, part in dataset.strata.items()]


def _dataset_row(dataset: DatasetScore, sparse: bool, ends: bool, name: str = "") -> list[Cell]:
    line = [
        words(name or dataset.task.file_stem(dataset.e)),
        *_summary_cells(dataset.summary),
        number(dataset.num_requested, 0),
    ]
    if sparse:
        line.append(share(dataset.kept.share if dataset.kept else None))
    if ends:
        line.append(number(dataset.num_ended_by_length, 0))
    if dataset.e:
        line += [cell for part in dataset.buckets.values() for cell in (number(part.score, 2), number(part.n, 0))]
    return line


def _summary_cells(summary: Summary) -> list[Cell]:
    return [number(summary.score, 2), number(summary.stderr, 1), number(summary.n, 0)]


def _average_row(name: str, mean: Average, sparse: bool, ends: bool) -> list[Cell]:
    label = average_label(name, mean.datasets, mean.of_datasets)
    line = [words(label), number(mean.score, 2), number(mean.stderr, 1), number(mean.n, 0), words("")]
    return [*line, *([share(mean.kept)] if sparse else []), *([words("")] if ends else [])]


def average_label(name: str, datasets: int, of: int) -> str:
    """Return the label of a category or average, which counts its datasets if some are missing."""
    return name if datasets == of else f"{name} ({datasets} of {of} datasets)"


def share(value: float | None) -> Cell:
    """Return a cell of a share of past tokens."""
    return Cell(format_percent(value), value)


def _records(result: RunScore) -> Iterator[dict[str, Value]]:
    for dataset in result.datasets:
        yield _record(result, "dataset", dataset.task.file_stem(dataset.e), as_average(dataset), dataset)
        for name, part in named_strata(dataset):
            yield _record(result, "stratum", name, as_average(part), part)
    for kind, means in (("category", result.categories), ("average", result.averages)):
        yield from (_record(result, kind, name, mean) for name, mean in means.items() if mean.datasets)


def _record(
    result: RunScore, kind: str, name: str, mean: Average, dataset: DatasetScore | None = None
) -> dict[str, Value]:
    """Return a row of the flat table.

    Only datasets and strata have `expected_n` and `ended_by_length`, and buckets for LongBench-E.
    """
    record: dict[str, Value] = {
        "run": str(result.folder),
        "kind": kind,
        "name": name,
        "score": mean.score,
        "stderr": mean.stderr,
        "n": mean.n,
        "expected_n": dataset.expected if dataset else None,
        "datasets": mean.datasets,
        "of_datasets": mean.of_datasets,
        "kept": mean.kept,
        "ended_by_length": dataset.num_ended_by_length if dataset else None,
    }
    for bucket in BUCKETS if result.e else ():
        part = dataset.buckets[bucket] if dataset else None
        record |= {bucket: part.score if part else None, f"{bucket} n": part.n if part else None}
    return record


def _notes(result: RunScore) -> Iterable[str]:
    stems = {id(dataset): dataset.task.file_stem(result.e) for dataset in result.datasets}
    partial = [
        f"{stems[id(dataset)]} {dataset.num_finished} of {dataset.num_requested} rows"
        for dataset in result.datasets
        if not dataset.complete and dataset.num_finished < dataset.num_requested
    ]
    if partial:
        yield f"INCOMPLETE: {', '.join(partial)}."
    datasets_by_warning: dict[str, list[str]] = {}
    for dataset in result.datasets:
        for warning in dataset.warnings:
            datasets_by_warning.setdefault(warning, []).append(stems[id(dataset)])
    for warning, names in datasets_by_warning.items():
        which = "every dataset" if len(names) == len(result.datasets) else ", ".join(names)
        yield f"Warning: {which}: {warning}."
    for dataset in result.datasets:
        if dataset.rouge_score:
            values = ", ".join(f"{name} {value:.2f}" for name, value in dataset.rouge_score.items())
            yield f"rouge-score: {stems[id(dataset)]}: {values}"
    for dataset in result.datasets:
        if dataset.strata:
            figures = zip(("overall", *STRATA), v2_result(dataset), strict=True)
            yield f"{stems[id(dataset)]} as published: {', '.join(f'{name} {value}' for name, value in figures)}."
    yield from format_kept(dataset.kept for dataset in result.datasets)
    yield from speed_lines(result.run)
