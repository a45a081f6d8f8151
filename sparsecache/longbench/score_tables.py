"""The scores of one run as a table, line by line, and what qualifies them."""

from collections.abc import Iterable, Iterator

from sparsecache.longbench.kept import kept_lines, percent
from sparsecache.longbench.report import speed_lines
from sparsecache.longbench.scores import BUCKETS, Average, DatasetScore, RunScore, Summary, as_average
from sparsecache.longbench.tables import Cell, Document, Table, Value, number, records, render, words

AVERAGE_NAMES = {
    "avg_en": "Avg, English",
    "avg_zh": "Avg, Chinese",
    "avg_all": "Avg, all",
    "flat_mean": "mean of datasets",
}


def score_table(result: RunScore) -> str:
    """The scores of one run on the terminal, with what qualifies them below the table."""
    return render(score_document(result), "terminal")


def score_document(result: RunScore) -> Document:
    """The scores of one run and what qualifies them; its records hold a line per dataset, category and average."""
    sparse = any(dataset.kept and dataset.kept.rows for dataset in result.datasets)
    means = [(name, mean) for name, mean in result.categories.items() if mean.datasets]
    averages = [(AVERAGE_NAMES[name], mean) for name, mean in result.averages.items() if mean.datasets]
    head = ["dataset", "score", "±", "n", "of", *(["kept"] if sparse else [])]
    rows = [_dataset_line(dataset, sparse) for dataset in result.datasets]
    for group in (means, averages):
        rows += [[], *(_average_line(name, mean, sparse) for name, mean in group)]
    if result.e:
        head += [text for name in BUCKETS for text in (name, "n")]
        rows = [row + [words("")] * (len(head) - len(row)) if row else row for row in rows]
    note = result.run.model.note
    return Document(
        tables=[Table("", head, rows)],
        records=records(str(result.folder), _records(result)),
        title=str(result.folder),
        lead=[f"Note: {note}"] if note else [],
        notes=list(_remarks(result)),
    )


def _dataset_line(dataset: DatasetScore, sparse: bool) -> list[Cell]:
    line = [words(dataset.task.file_stem(dataset.e)), *_summary_cells(dataset.summary), number(dataset.asked, 0)]
    if sparse:
        line.append(share(dataset.kept.share if dataset.kept else None))
    if dataset.e:
        line += [cell for part in dataset.buckets.values() for cell in (number(part.score, 2), number(part.n, 0))]
    return line


def _summary_cells(summary: Summary) -> list[Cell]:
    return [number(summary.score, 2), number(summary.stderr, 1), number(summary.n, 0)]


def _average_line(name: str, mean: Average, sparse: bool) -> list[Cell]:
    label = average_label(name, mean.datasets, mean.of)
    line = [words(label), number(mean.score, 2), number(mean.stderr, 1), number(mean.n, 0), words("")]
    return [*line, share(mean.kept)] if sparse else line


def average_label(name: str, datasets: int, of: int) -> str:
    """A category or average as people read it: with the number of its datasets, if some are missing."""
    return name if datasets == of else f"{name} ({datasets} of {of} datasets)"


def share(value: float | None) -> Cell:
    """A cell of a share of past tokens."""
    return Cell(percent(value), value)


def _records(result: RunScore) -> Iterator[dict[str, Value]]:
    for dataset in result.datasets:
        yield _record(result, "dataset", dataset.task.file_stem(dataset.e), as_average(dataset), dataset)
    for kind, means in (("category", result.categories), ("average", result.averages)):
        yield from (_record(result, kind, name, mean) for name, mean in means.items() if mean.datasets)


def _record(
    result: RunScore, kind: str, name: str, mean: Average, dataset: DatasetScore | None = None
) -> dict[str, Value]:
    """One line of the flat table; only a dataset has a number of rows asked for, and buckets with LongBench-E."""
    record: dict[str, Value] = {
        "run": str(result.folder),
        "kind": kind,
        "name": name,
        "score": mean.score,
        "stderr": mean.stderr,
        "n": mean.n,
        "expected_n": dataset.expected if dataset else None,
        "datasets": mean.datasets,
        "of_datasets": mean.of,
        "kept": mean.kept,
    }
    for bucket in BUCKETS if result.e else ():
        part = dataset.buckets[bucket] if dataset else None
        record |= {bucket: part.score if part else None, f"{bucket} n": part.n if part else None}
    return record


def _remarks(result: RunScore) -> Iterable[str]:
    stems = {id(dataset): dataset.task.file_stem(result.e) for dataset in result.datasets}
    partial = [
        f"{stems[id(dataset)]} {dataset.finished} of {dataset.asked} rows"
        for dataset in result.datasets
        if not dataset.complete and dataset.finished < dataset.asked
    ]
    if partial:
        yield f"INCOMPLETE: {', '.join(partial)}."
    said_of: dict[str, list[str]] = {}
    for dataset in result.datasets:
        for warning in dataset.warnings:
            said_of.setdefault(warning, []).append(stems[id(dataset)])
    for warning, names in said_of.items():
        whom = "every dataset" if len(names) == len(result.datasets) else ", ".join(names)
        yield f"Warning: {whom}: {warning}."
    for dataset in result.datasets:
        if dataset.rouge_score:
            values = ", ".join(f"{name} {value:.2f}" for name, value in dataset.rouge_score.items())
            yield f"rouge-score: {stems[id(dataset)]}: {values}"
    yield from kept_lines(dataset.kept for dataset in result.datasets)
    yield from speed_lines(result.run)
