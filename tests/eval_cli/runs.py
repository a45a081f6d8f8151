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


def save_run(tmp_path: Path, name: str, preds: list[str], **more: Any) -> Path:
    """Write a run of qasper as longbench_pred.py does, with a kept share of 0.1."""
    rows = [row(at, pred, kept=0.1, prompt_sha256=f"{at:064}", **more) for at, pred in enumerate(preds)]
    folder = save(tmp_path / "pred" / "m" / name, "qasper", rows)
    record = json.loads((folder / "run.json").read_text())
    same = {key: {"qasper": key} for key in ("templates", "protocol", "data")}
    record["identity"] = {"checkpoint": "abc", "method": name, "options": {}, "dtype": "float32", **same}
    clock = {"prefill_s": 1, "prefill_tokens": 9, "decode_s": 2, "decode_tokens": 100, "peak_gpu_bytes": None}
    record["sessions"] = [{"id": "1-host", "device": "cpu", "gpu": None, "batch_size": 1, "clock": clock}]
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def one_sentence(done: CompletedProcess[str]) -> str:
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    return done.stderr
