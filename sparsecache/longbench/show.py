"""Formats the rows of a run for the terminal: the worst first, or changed ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparsecache.errors import UsageError
from sparsecache.longbench.jsonl import get_number
from sparsecache.longbench.kept import format_percent
from sparsecache.longbench.paired import common_rows
from sparsecache.longbench.runs import run_names
from sparsecache.longbench.score_types import DatasetScore, RunScore
from sparsecache.longbench.terminal import escape_control_chars, truncate_middle


@dataclass(frozen=True)
class ShownRow:
    """A row with its score in percent. `before`: the same row in another run."""

    stem: str
    score: float
    record: dict[str, Any]
    before: "ShownRow | None" = None

    @property
    def change(self) -> float:
        """Points gained over the other run."""
        return self.score - self.before.score if self.before else 0.0


def worst_rows(run: RunScore, dataset: str | None = None) -> list[ShownRow]:
    """Return all rows, lowest score first, ties in file order.

    Raises UsageError for an unknown dataset.
    """
    return sorted((row for part in _chosen(run, dataset) for row in _rows(part)), key=lambda row: row.score)


def changed_rows(run: RunScore, other: RunScore, dataset: str | None = None) -> list[ShownRow]:
    """Return the common rows whose text differs, greatest loss from `other` first.

    Raises UsageError for an unknown dataset, and for runs without common rows.
    """
    _chosen(run, dataset)
    after, before = common_rows([run, other]).runs
    pairs = [
        ShownRow(new.stem, new.score, new.record, old)
        for mine, theirs in zip(after.datasets, before.datasets, strict=True)
        for new, old in zip(_rows(mine), _rows(theirs), strict=True)
        if dataset in (None, mine.task.name, new.stem) and new.record["pred"] != old.record["pred"]
    ]
    return sorted(pairs, key=lambda row: row.change)


def format_rows(rows: Sequence[ShownRow], runs: Sequence[RunScore], max_rows: int, columns: int) -> Iterator[str]:
    """Yield the lines for at most `max_rows` rows.

    Texts are shortened to about `columns` terminal columns.

    `runs`: the run shown, and the other run for changed rows.
    """
    names = run_names(runs)
    order = "worst first" if len(runs) == 1 else f"text differs from {names[1]}, greatest loss first"
    shown = f"; {max_rows} shown" if len(rows) > max_rows else ""
    yield escape_control_chars(f"{runs[0].folder}: {len(rows)} rows, {order}{shown}")
    for row in rows[:max_rows]:
        yield ""
        yield escape_control_chars(row_heading(row))
        texts = row_texts(row, names)
        margin = max(len(name) for name, _ in texts)
        yield from (
            f"  {escape_control_chars(name):{margin}}  {truncate_middle(escape_control_chars(text), columns)}"
            for name, text in texts
        )


def row_texts(row: ShownRow, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return (label, text) pairs: end of the prompt, predictions, answers and error.

    `names`: the run and, for changed rows, the other run. Rows without `prompt_end` have no prompt entry.
    """
    record = row.record
    predictions = [("prediction", record["pred"])]
    if row.before:
        predictions = [(names[1], row.before.record["pred"]), (names[0], record["pred"])]
    prompt = [("prompt ends", end)] if isinstance(end := record.get("prompt_end"), str) else []
    error = [("error", str(record["error"]))] if "error" in record else []
    return [*prompt, *predictions, ("answers", " | ".join(record["answers"])), *error]


def _chosen(run: RunScore, dataset: str | None) -> list[DatasetScore]:
    names = [part.task.file_stem(part.e) for part in run.datasets]
    found = [part for part in run.datasets if dataset in (None, part.task.name, part.task.file_stem(part.e))]
    if not found:
        raise UsageError(f"There is no dataset {dataset!r} in {run.folder}. It holds: {', '.join(names)}.")
    return found


def _rows(part: DatasetScore) -> Iterator[ShownRow]:
    stem = part.task.file_stem(part.e)
    for row, record in zip(part.rows, part.records, strict=True):
        yield ShownRow(stem, 100 * row.score, record)


def row_heading(row: ShownRow) -> str:
    """Return one line with a row's score, lengths and kept share, as far as they are recorded."""
    record = row.record
    score = f"score {row.score:.2f}"
    if row.before:
        score += f", was {row.before.score:.2f} ({row.change:+.2f})"
    prompt, original = get_number(record, "prompt_tokens"), get_number(record, "original_tokens")
    whole = f" of {original:g}" if record.get("truncated") is True and original is not None else ""
    length, new, kept = (get_number(record, key) for key in ("length", "new_tokens", "kept"))
    ended = f" (ended by {record['finish_reason']})" if "finish_reason" in record else ""
    parts = [
        f"{row.stem} {record.get('_id') or '(no _id)'}",
        score,
        f"length {length:g}" if length is not None else "",
        f"prompt {prompt:g}{whole} tokens" if prompt is not None else "",
        f"{new:g} new tokens{ended}" if new is not None else "",
        f"kept {format_percent(kept)}" if kept is not None else "",
    ]
    return ", ".join(filter(None, parts))
