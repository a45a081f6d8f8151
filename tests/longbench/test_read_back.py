"""A row counts as done if it can be scored, and a run ends with what was read back of its files."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sparsecache.errors import UsageError
from sparsecache.longbench.records import PredictionFile, read_rows, verify_rows


def row(row_id: str, **more: Any) -> dict[str, Any]:
    return {"pred": "x", "answers": ["a"], "_id": row_id, **more}


def save(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    return path


def test_a_row_that_lacks_its_prediction_is_not_done(tmp_path: Path) -> None:
    bare, no_answers = {"_id": "b"}, {"_id": "c", "pred": "x"}
    path = save(tmp_path / "qasper.jsonl", row("a"), bare, no_answers, row("d"))
    with PredictionFile(path) as file:
        assert file.done == {"a", "d"}
        file.append(row("b"))
        file.append({"_id": "c"})
        assert file.done == {"a", "b", "d"}
    assert [item["_id"] for item in read_rows(path)] == ["a", "d", "b", "c"]


@pytest.mark.parametrize("lost", [{"_id": "b"}, {"_id": "b", "pred": "x"}, {"_id": "x", "pred": "x", "answers": []}])
def test_a_wanted_row_that_is_not_read_back_is_reported(tmp_path: Path, lost: dict[str, Any]) -> None:
    path = save(tmp_path / "qasper.jsonl", row("a"), lost, row("c", error="failed"))
    assert len(verify_rows(path, ["a", "c"])) == 3
    with pytest.raises(UsageError, match=r"qasper\.jsonl lacks 1 rows that this run wrote \(b\).*same command again"):
        verify_rows(path, ["a", "b", "c"])
    path.unlink()
    with pytest.raises(UsageError, match=r"lacks 30 rows that this run wrote \(0, 1, 2, 3, 4 and 25 more\)"):
        verify_rows(path, map(str, range(30)))
    assert verify_rows(path, []) == []


@pytest.mark.parametrize("change", ["replaced", "deleted", "moved", "a folder"])
def test_a_file_that_is_replaced_meanwhile_is_noticed_at_the_next_row(tmp_path: Path, change: str) -> None:
    path = tmp_path / "qasper.jsonl"
    with PredictionFile(path) as file:
        file.append(row("a"))
        if change == "replaced":
            os.replace(save(tmp_path / "other", row("a")), path)
        else:
            path.rename(tmp_path / "elsewhere")
        if change == "a folder":
            path.mkdir()
        with pytest.raises(UsageError, match=r"qasper\.jsonl was deleted or replaced while this run wrote to it"):
            file.append(row("b"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"pred": 5}, "pred is 5; it must be a text"),
        ({"answers": "a"}, "answers is 'a'; it must be a list"),
        ({"answers": ["a", None]}, r"answers\[1\] is null; it must be a text"),
        ({"all_classes": {"a": 1}}, r"all_classes is {'a': 1}; it must be a list"),
        ({"_id": ["a"]}, r"_id is \['a'\]; it must be a text or a whole number"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    path = save(tmp_path / "qasper.jsonl", row("a"), row("b") | changes)
    with pytest.raises(UsageError, match=rf"qasper\.jsonl, line 2: {problem}\. "):
        list(read_rows(path))
    with pytest.raises(UsageError, match="line 2"):
        PredictionFile(path)
