"""The rows of a run on the terminal, worst first, or those whose text changed from another run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparsecache.errors import UsageError
from sparsecache.longbench.jsonl import figure
from sparsecache.longbench.kept import percent
from sparsecache.longbench.paired import common_rows
from sparsecache.longbench.runs import short_names
from sparsecache.longbench.scores import DatasetScore, RunScore
from sparsecache.longbench.terminal import cut, visible


@dataclass(frozen=True)
class ShownRow:
    """A row with its score in percent; `before`: the same row of another run."""

    stem: str
    score: float
    record: dict[str, Any]
    before: "ShownRow | None" = None

    @property
    def change(self) -> float:
        """Points gained from the other run."""
        return self.score - self.before.score if self.before else 0.0


def worst_rows(run: RunScore, dataset: str | None = None) -> list[ShownRow]:
    """All rows, the lowest score first, then in the files' order. Raises UsageError for a dataset that is not there."""
    return sorted((row for part in _chosen(run, dataset) for row in _rows(part)), key=lambda row: row.score)


def changed_rows(run: RunScore, other: RunScore, dataset: str | None = None) -> list[ShownRow]:
    """The rows of both whose text differs, the greatest loss from `other` first.

    Raises UsageError for a dataset that is not there, or for runs without common rows.
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


def lines(rows: Sequence[ShownRow], runs: Sequence[RunScore], most: int, columns: int) -> Iterator[str]:
    """At most so many rows, long texts cut to about so many columns; `runs`: the one shown and the other, if any."""
    names = short_names([run.folder for run in runs])
    what = "worst first" if len(runs) == 1 else f"those whose text differs from {names[1]}, greatest loss first"
    shown = f"; {most} of them" if len(rows) > most else ""
    yield visible(f"{runs[0].folder}: {len(rows)} rows, {what}{shown}")
    for row in rows[:most]:
        yield ""
        yield visible(heading(row))
        texts = row_texts(row, names)
        margin = max(len(name) for name, _ in texts)
        yield from (f"  {visible(name):{margin}}  {cut(visible(text), columns)}" for name, text in texts)


def row_texts(row: ShownRow, names: Sequence[str]) -> list[tuple[str, str]]:
    """What was asked, said and expected, as (heading, text); `names` of the run and of the other, if there is one.

    Files from elsewhere, or written before rows held `prompt_end`, do not say what was asked.
    """
    record = row.record
    said = [("prediction", record["pred"])]
    if row.before:
        said = [(names[1], row.before.record["pred"]), (names[0], record["pred"])]
    asked = [("prompt ends", end)] if isinstance(end := record.get("prompt_end"), str) else []
    failed = [("error", str(record["error"]))] if "error" in record else []
    return [*asked, *said, ("answers", " | ".join(record["answers"])), *failed]


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


def heading(row: ShownRow) -> str:
    """What the record says of a row beside its texts; files from elsewhere say less."""
    record = row.record
    score = f"score {row.score:.2f}"
    if row.before:
        score += f", was {row.before.score:.2f} ({row.change:+.2f})"
    prompt, original = figure(record, "prompt_tokens"), figure(record, "original_tokens")
    whole = f" of {original:g}" if record.get("truncated") is True and original is not None else ""
    length, new, kept = (figure(record, key) for key in ("length", "new_tokens", "kept"))
    ended = f" (ended by {record['finish_reason']})" if "finish_reason" in record else ""
    parts = [
        f"{row.stem} {record.get('_id') or '(no _id)'}",
        score,
        f"length {length:g}" if length is not None else "",
        f"prompt {prompt:g}{whole} tokens" if prompt is not None else "",
        f"{new:g} new tokens{ended}" if new is not None else "",
        f"kept {percent(kept)}" if kept is not None else "",
    ]
    return ", ".join(filter(None, parts))
