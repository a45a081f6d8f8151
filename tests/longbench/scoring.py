"""Writes small prediction files, scores and shows them, and finds the lines of comparisons."""

import json
from pathlib import Path
from typing import Any

from sparsecache.longbench.comparison import Comparison, Difference, Group
from sparsecache.longbench.score_tables import score_document
from sparsecache.longbench.score_types import DatasetScore, RunScore
from sparsecache.longbench.scores import ScoringOptions, score_file
from sparsecache.longbench.tables import render
from sparsecache.longbench.tasks import load_tasks


def row(number: int, pred: str = "yes", **more: Any) -> dict[str, Any]:
    made = {"pred": pred, "answers": ["yes"], "all_classes": None, "length": 100, "_id": str(number)}
    return {key: value for key, value in {**made, **more}.items() if value is not ...}


def save(folder: Path, stem: str, rows: list[dict[str, Any]], end: str = "\n") -> Path:
    path = folder / f"{stem}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + end if rows else "", encoding="utf-8", newline="\n")
    return path


def score(folder: Path, rows: list[dict[str, Any]], stem: str = "qasper", **options: Any) -> DatasetScore:
    """Write a file of these rows and score it; all of them are expected."""
    path = save(folder, stem, rows)
    task = load_tasks()[stem.removesuffix("_e")]
    return score_file(path, task, stem.endswith("_e"), len(rows), ScoringOptions(**options))


def score_table(result: RunScore) -> str:
    """Return the scores of one run as the terminal shows them."""
    return render(score_document(result), "terminal")


def expect_rows(folder: Path, **rows: int) -> None:
    record = {"datasets": {stem: {"expected_rows": count} for stem, count in rows.items()}}
    (folder / "run.json").write_text(json.dumps(record))


def lines_of(comparison: Comparison) -> dict[str, Group]:
    return {line.name: line for line in comparison.groups}


def difference(comparison: Comparison, name: str, run: int = 1) -> Difference:
    found = lines_of(comparison)[name].entries[run].difference
    assert found is not None
    return found
