"""A row that fails is an error row: the run goes on, and the next one retries it."""

from typing import Any

import pytest
import torch

from sparsecache.cache import FullCache
from sparsecache.engine.tokenizer import Tokenizer
from sparsecache.synthetic.rows import make_rows

ROWS = 3  # as conftest.py asks for


@pytest.mark.parametrize(
    ("error", "batch_size"),
    [(RuntimeError("broken"), "1"), (RuntimeError("broken"), "2"), (torch.OutOfMemoryError("out of memory"), "1")],
    ids=repr,
)
def test_a_failed_row_is_recorded_and_retried_by_the_next_run(
    error, batch_size, predict, folder, monkeypatch, read_rows, schema
) -> None:
    whole = FullCache.prefill
    calls = iter(range(100))

    def fail_second(self, *arguments: Any) -> None:
        if next(calls) == 1:
            raise error
        whole(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FullCache, "prefill", fail_second)
        told = predict("--batch_size", batch_size)
    assert told.exit_code == 1
    ids = [row["_id"] for row in make_rows("qasper", ROWS, 256, 0)]
    rows = {row["_id"]: row for row in read_rows(folder / "qasper.jsonl")}
    assert list(rows) != [] and rows.keys() == set(ids)
    failed = rows[ids[1]]
    assert failed["error"] == f"{type(error).__name__}: {error}"
    assert failed["pred"] == "" and failed["answers"] and "new_tokens" not in failed
    good = {key: row for key, row in rows.items() if key != ids[1]}
    assert not any("error" in row for row in good.values())

    told = predict("--batch_size", batch_size)
    assert told.exit_code == 0 and f"1 of {ROWS} to do" in told.stdout
    rows = {row["_id"]: row for row in read_rows(folder / "qasper.jsonl")}
    assert len(read_rows(folder / "qasper.jsonl")) == ROWS
    assert {key: rows[key] for key in good} == good
    assert "error" not in rows[ids[1]] and rows[ids[1]].keys() == schema.keys()


@pytest.mark.parametrize(("error", "verify"), [(KeyError, "0"), (Exception, "0"), (ValueError, "2")])
def test_a_row_that_makes_no_prompt_is_one_error_row(error, verify, predict, folder, monkeypatch, read_rows) -> None:
    from sparsecache.longbench.prompts import Prompter

    whole = Prompter.build
    bad = make_rows("qasper", ROWS, 256, 0)[1]["_id"]

    def build(self: Prompter, task: Any, row: dict[str, Any]) -> Any:
        if row["_id"] == bad:
            raise error("no such character")
        return whole(self, task, row)

    monkeypatch.setattr(Prompter, "build", build)
    told = predict("--verify", verify)
    assert told.exit_code == 1
    rows = read_rows(folder / "qasper.jsonl")
    assert sorted(row["_id"] for row in rows) == sorted(row["_id"] for row in make_rows("qasper", ROWS, 256, 0))
    (failed,) = (row["error"] for row in rows if "error" in row)
    assert failed.startswith(f"{error.__name__}: ") and "no such character" in failed
    assert "verify" not in told.stdout or "1 of 1 prompts" in told.stdout  # of the two it skips the bad one


@pytest.mark.parametrize(
    ("report", "error", "batch_size"),
    [
        ({"pred": "yes", "length": 3, "kept": 1}, "the method reports length, pred, which are fields of the row", "1"),
        ({"new_tokens": 3}, "the method reports new_tokens", "2"),
        ({"kept": float("nan")}, "ValueError", "1"),
        ({"kept": torch.tensor(3)}, "TypeError", "2"),
        ({("kept", 1): 2}, "TypeError", "1"),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_a_report_that_cannot_be_recorded_is_an_error_row_and_the_run_goes_on(
    report, error, batch_size, predict, folder, add_method, read_rows, schema
) -> None:
    kind = add_method("def report(self, slot):\n    return {}").Mine
    calls = iter(range(100))
    kind.report = lambda self, slot: report if next(calls) == 1 else {"kept": 1}
    assert predict("--method", "mine", "--batch_size", batch_size).exit_code == 1
    rows = read_rows(folder.parent / "mine" / "qasper.jsonl")
    assert len(rows) == ROWS
    (failed,) = (row for row in rows if "error" in row)
    assert error in failed["error"] and "\n" not in failed["error"]
    source = next(row for row in make_rows("qasper", ROWS, 256, 0) if row["_id"] == failed["_id"])
    assert (failed["pred"], failed["length"], failed["answers"]) == ("", source["length"], source["answers"])
    assert "kept" not in failed and "new_tokens" not in failed
    kind.report = lambda self, slot: {"kept": 1}
    told = predict("--method", "mine", "--batch_size", batch_size)
    assert told.exit_code == 0 and f"1 of {ROWS} to do" in told.stdout
    rows = read_rows(folder.parent / "mine" / "qasper.jsonl")
    assert len(rows) == ROWS and all(row.keys() == {*schema, "kept"} for row in rows)


def test_a_text_that_cannot_be_decoded_is_an_error_row_and_the_run_goes_on(
    predict, folder, monkeypatch, read_rows
) -> None:
    whole = Tokenizer.decode
    calls = iter(range(100))

    def decode(self: Any, *arguments: Any, **options: Any) -> str:
        if next(calls) == 1:
            raise OverflowError("no such token")
        return whole(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "decode", decode)
        assert predict().exit_code == 1
    rows = read_rows(folder / "qasper.jsonl")
    assert len(rows) == ROWS
    assert [row.get("error") for row in rows] == [None, "OverflowError: no such token", None]
    assert predict().exit_code == 0
