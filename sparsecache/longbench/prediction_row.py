"""The fields of a prediction row that scores depend on, checked where rows are read.

What a run measured of a row (`kept`, `decode_s`, ...) is read through `jsonl.figure`, which takes any value that is
not a usable number as missing: files from elsewhere may hold other things under these names, and must stay scorable.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

from sparsecache.longbench.schema import SchemaError, parse

NEEDED = ("pred", "answers")  # without which a row cannot be scored


class PredictionRow(TypedDict, total=False):
    """The fields of the official format, and the row's name. A file from elsewhere may lack `_id`."""

    pred: str
    answers: list[str]
    all_classes: list[str] | None
    _id: str | int | None


def check_row(row: dict[str, Any], needed: tuple[str, ...] = ()) -> None:
    """Raises SchemaError for a field of a wrong type, and for a `needed` one that is missing."""
    if missing := [key for key in needed if key not in row]:
        raise SchemaError(f"{missing[0]} is missing; a row needs `pred` (a text) and `answers` (a list of texts)")
    parse(PredictionRow, row)


def is_finished(row: Mapping[str, Any]) -> bool:
    """Whether a row holds a prediction that can be scored, and no error."""
    return "error" not in row and all(key in row for key in NEEDED)
