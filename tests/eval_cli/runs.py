"""Small runs for the commands, and the expected form of an error."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

Evaluate = Callable[..., CompletedProcess[str]]


def row(number: int, pred: str = "yes", **more: Any) -> dict[str, Any]:
    return {"pred": pred, "answers": ["yes"], "all_classes": None, "length": 5000, "_id": str(number), **more}


def save(folder: Path, stem: str, rows: list[dict[str, Any]], expected: int | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    record = {"datasets": {stem: {"expected_rows": len(rows) if expected is None else expected}}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def one_sentence(done: CompletedProcess[str]) -> str:
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    return done.stderr
