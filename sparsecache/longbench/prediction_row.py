"""Checks the fields of a prediction row that scores depend on.

Measurements (`kept`, `decode_s`, ...) are not checked: `jsonl.get_number` treats any unusable value as missing, because
files from other programs may use these names differently and must still be scored.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

from sparsecache.longbench.schema import SchemaError, parse

NEEDED = ("pred", "answers")  # to score a row


class PredictionRow(TypedDict, total=False):
    """The fields of the official format, and `_id`, which other programs may not write."""

    pred: str
    answers: list[str]
    all_classes: list[str] | None
    _id: str | int | None


def check_row(row: dict[str, Any], needed: tuple[str, ...] = ()) -> None:
    """Raise SchemaError for a field of a wrong type, and for a missing `needed` field."""
    if missing := [key for key in needed if key not in row]:
        raise SchemaError(f"{missing[0]} is missing; a row needs `pred` (a text) and `answers` (a list of texts)")
    parse(PredictionRow, row)


def as_longbench_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of LongBench v2's own code in the form of LongBench's; any other row as it is.

    That code writes the answer's text to `response`, the letter in it (or null) to `pred`, and the right letter to
    `answer`.
    """
    if "answers" in row or "error" in row or not {"response", "answer"} <= row.keys():
        return row
    return {**row, "pred": row["response"], "answers": [row["answer"]]}


def is_finished(row: Mapping[str, Any]) -> bool:
    """Return whether a row holds a prediction that can be scored, and no error."""
    return "error" not in row and all(key in row for key in NEEDED)
