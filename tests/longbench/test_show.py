"""Rows on the terminal: order, changed rows, and escaped control characters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsecache.errors import UsageError
from sparsecache.longbench.scores import score_run
from sparsecache.longbench.show import changed_rows, format_rows, worst_rows
from sparsecache.longbench.terminal import display_width

MakeRun = Callable[..., Path]
Row = Callable[..., dict[str, Any]]


def test_the_worst_rows_come_first(make_run: MakeRun, row: Row) -> None:
    rows = {
        "qasper": [row("a"), row("b", "no"), row("c", "yes maybe")],
        "hotpotqa": [row("d", "no"), row("e")],
    }
    run = score_run(make_run("a", rows))
    found = worst_rows(run)
    assert [(each.stem, each.record["_id"]) for each in found] == [
        ("qasper", "b"), ("hotpotqa", "d"), ("qasper", "c"), ("qasper", "a"), ("hotpotqa", "e"),
    ]  # fmt: skip
    assert [round(each.score, 2) for each in found] == [0.0, 0.0, 66.67, 100.0, 100.0]
    assert [each.record["_id"] for each in worst_rows(run, "hotpotqa")] == ["d", "e"]
    with pytest.raises(UsageError, match=r"There is no dataset 'lcc' in .*It holds: qasper, hotpotqa\."):
        worst_rows(run, "lcc")


def test_a_row_is_shown_with_its_recorded_values(make_run: MakeRun, row: Row) -> None:
    full = row(
        "7", "yes\nor no", answers=["yes", "ja"], original_tokens=900, truncated=True, new_tokens=4,
        finish_reason="stop", kept=0.0312, prompt_end="Who is it?\nAnswer:",
    )  # fmt: skip
    run = score_run(make_run("a", {"qasper": [full, row("8", "", error="OutOfMemoryError: 3 GiB")]}))
    text = list(format_rows(worst_rows(run), [run], 10, 100))
    assert text == [
        f"{run.folder}: 2 rows, worst first",
        "",
        "qasper 8, score 0.00, length 100, prompt 50 tokens",
        "  prediction  ",
        "  answers     yes",
        "  error       OutOfMemoryError: 3 GiB",
        "",
        "qasper 7, score 50.00, length 100, prompt 50 of 900 tokens, 4 new tokens (ended by stop), kept 3.1%",
        "  prompt ends  Who is it?⏎Answer:",
        "  prediction   yes⏎or no",
        "  answers      yes | ja",
    ]


def test_at_most_max_rows_are_shown(make_run: MakeRun, row: Row) -> None:
    run = score_run(make_run("a", {"qasper": [row(at) for at in range(5)]}))
    text = list(format_rows(worst_rows(run), [run], 2, 100))
    assert text[0].endswith(": 5 rows, worst first; 2 shown")
    assert sum(line.startswith("qasper ") for line in text) == 2


def test_rows_of_other_programs_are_shown(make_run: MakeRun) -> None:
    bare = [{"pred": "no", "answers": [], "all_classes": None}] * 2
    run = score_run(make_run("a", {"qasper": bare}, record=False))
    assert list(format_rows(worst_rows(run), [run], 1, 100))[2:] == [
        "qasper (no _id), score 0.00", "  prediction  no", "  answers     "]  # fmt: skip


def test_changed_rows_show_both_predictions_greatest_loss_first(make_run: MakeRun, row: Row) -> None:
    before = {"qasper": [row(1), row(2), row(3, "no"), row(4, "same"), row(9)], "lcc": [row(1)], "trec": []}
    after = {"qasper": [row(4, "same"), row(3), row(2, "yes maybe"), row(1, "no")], "lcc": [row(1, "yes.")]}
    one, two = (score_run(make_run(name, rows)) for name, rows in (("old", before), ("new", after)))
    found = changed_rows(two, one)
    assert [(each.stem, each.record["_id"], round(each.change)) for each in found] == [
        ("qasper", "1", -100), ("qasper", "2", -33), ("lcc", "1", -14), ("qasper", "3", 100)]  # fmt: skip
    assert [each.stem for each in changed_rows(two, one, "lcc")] == ["lcc"]
    text = list(format_rows(found, [two, one], 1, 100))
    assert text[0].endswith("new: 4 rows, text differs from old, greatest loss first; 1 shown")
    assert text[2:] == [
        "qasper 1, score 0.00, was 100.00 (-100.00), length 100, prompt 50 tokens",
        "  old      yes",
        "  new      no",
        "  answers  yes",
    ]
    assert list(format_rows(changed_rows(one, one), [one, one], 9, 100)) == [
        f"{one.folder}: 0 rows, text differs from old (2), greatest loss first"
    ]
    with pytest.raises(UsageError, match="There is no dataset 'musique'"):
        changed_rows(two, one, "musique")


def test_control_characters_in_data_are_escaped(make_run: MakeRun, row: Row) -> None:
    nasty = "\x1b[2J\x1b]0;title\x07\x9b31m\u202egnp\u2028\r\b"
    rows = [
        row(nasty, nasty, answers=[nasty], finish_reason=nasty, prompt_end=nasty),
        row(2, "", error=nasty, answers=[nasty, nasty]),
    ]
    run = score_run(make_run("a", {"qasper": rows}))
    text = list(format_rows(worst_rows(run), [run], 9, 400))
    assert all(line.isprintable() for line in text)
    assert "\\x1b[2J\\x1b]0;title\\x07\\x9b31m\\u202egnp\\u2028\\r\\x08" in "".join(text)


def test_long_texts_are_shortened_by_width(make_run: MakeRun, row: Row) -> None:
    run = score_run(make_run("a", {"vcsum": [row(1, "会议" * 500, answers=["a" * 90 + "b" * 90])]}))
    prediction, answers = list(format_rows(worst_rows(run), [run], 9, 60))[3:5]
    assert prediction == "  prediction  " + "会议" * 7 + "会 [... 970 characters ...] " + "议" + "会议" * 7
    assert answers == "  answers     " + "a" * 30 + " [... 120 characters ...] " + "b" * 30
    escapes = score_run(make_run("b", {"qasper": [row(1, "\x1b" * 100)]}))
    assert display_width(list(format_rows(worst_rows(escapes), [escapes], 9, 60))[3]) < 14 + 60 + 35
    assert display_width(prediction) == 14 + 60 + len(" [... 970 characters ...] ")
