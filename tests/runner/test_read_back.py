"""Exit code 0 means that every wanted row was read back at the end."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def _replace(file: Path) -> None:
    other = file.with_suffix(".other")
    other.write_text(file.read_text().splitlines()[0] + "\n")
    os.replace(other, file)


def _delete(file: Path) -> None:
    file.unlink()


def _truncate(file: Path) -> None:
    os.truncate(file, file.read_bytes().index(b"\n") + 1)


def _empty_row(file: Path) -> None:
    lines = file.read_text().splitlines()
    lines[1] = json.dumps({"_id": json.loads(lines[1])["_id"]})
    file.write_text("\n".join(lines) + "\n")


def _other_ids(file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row | {"_id": f"other {row['_id']}"}) + "\n" for row in rows))


@pytest.mark.parametrize("tamper", [_replace, _delete, _truncate, _empty_row, _other_ids])
def test_a_row_that_is_not_there_at_the_end_fails_the_run(
    tamper: Callable[[Path], None], predict, folder, monkeypatch
) -> None:
    file = folder / "qasper.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("sparsecache.runner.run.workers_lines", lambda session: tamper(file) or [])
        told = predict()
    assert told.exit_code == 2
    assert f"Error: {file} lacks " in told.stderr and "Run the same command again" in told.stderr


def test_a_row_that_turned_into_an_error_is_a_failed_row(predict, folder, monkeypatch) -> None:
    file = folder / "qasper.jsonl"

    def tamper(session: object) -> list[str]:
        first, *others = file.read_text().splitlines()
        file.write_text("\n".join([json.dumps(json.loads(first) | {"error": "broken"}), *others]) + "\n")
        return []

    with monkeypatch.context() as patch:
        patch.setattr("sparsecache.runner.run.workers_lines", tamper)
        assert predict().exit_code == 1
    assert predict().exit_code == 0
