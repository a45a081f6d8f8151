"""Checks the rows of a dataset, fills in what rows of one's own may lack, and converts those of LongBench v2."""

import hashlib
import json
from typing import Any

from datasets import Features, List, Value

from sparsecache.errors import short
from sparsecache.longbench.tasks import CHOICE_FIELDS, Task

_TYPES: dict[str, type] = {"input": str, "context": str, "length": int, "dataset": str, "language": str, "_id": str}
_NEEDED = ("input", "context", "answers")
_BASE = {
    "input": Value("string"),
    "context": Value("large_string"),
    "answers": List(Value("string")),
    "length": Value("int64"),
    "dataset": Value("string"),
    "language": Value("string"),
    "all_classes": List(Value("string")),
    "_id": Value("string"),
}
_V2 = {"length": Value("string"), "difficulty": Value("string"), **dict.fromkeys(CHOICE_FIELDS, Value("string"))}
_RULER = {"examples": Value("large_string")}
_V2_TEXTS = ("question", "context", *CHOICE_FIELDS, "answer", "difficulty", "length", "_id")
DIFFICULTIES, LENGTHS = ("easy", "hard"), ("short", "medium", "long")
_ALLOWED = {"answer": ("A", "B", "C", "D"), "difficulty": DIFFICULTIES, "length": LENGTHS}


class RowChecker:
    """Checks the rows of one dataset, one after the other.

    features: the types of a checked row.
    """

    def __init__(self, task: Task, e: bool, fill: bool):
        """fill: whether rows may lack all fields but `input`, `context` and `answers`."""
        self._task, self._stem, self._fill = task, task.file_stem(e), fill
        self._v2 = task.benchmark == "longbench_v2"
        self._places: dict[str, str] = {}
        self.features = Features({**_BASE, **{"longbench_v2": _V2, "ruler": _RULER}.get(task.benchmark, {})})

    def check(self, record: dict[str, Any], place: str) -> tuple[dict[str, Any], str | None]:
        """Return the row of a record and None, or the record and what is wrong with it.

        place: the record's line or index in its file, for messages.
        """
        if self._v2:
            problem = _find_v2_problem(record)
        else:
            problem = _find_missing(record, _NEEDED if self._fill else tuple(_BASE))
        if problem is None:
            record = _v2_row(record, self._stem) if self._v2 else self._filled(record)
            problem = self._find_problem(record)
        if problem is not None:
            return record, problem
        self._places[record["_id"]] = place
        return {key: record[key] for key in self.features}, None

    def _filled(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return a record with the fields that it lacks, if it may lack them."""
        if not self._fill:
            return record
        context = str(record["context"])  # `_find_problem` refuses other types
        words = len(context) if self._task.language == "zh" else len(context.split())
        filled = {
            "length": words,
            "dataset": self._stem,
            "language": self._task.language,
            "all_classes": None,
            **record,
        }
        return filled if "_id" in record else {**filled, "_id": self._new_id(record)}

    def _new_id(self, record: dict[str, Any]) -> str:
        """Return a hash of what defines a row; a repeated row gets its number added."""
        content = json.dumps([record[key] for key in _NEEDED])
        digest = hashlib.sha256(content.encode()).hexdigest()[:24]
        row_id, number = digest, 1
        while row_id in self._places:
            number += 1
            row_id = f"{digest}-{number}"
        return row_id

    def _find_problem(self, row: dict[str, Any]) -> str | None:
        types = {**_TYPES, "length": str} if self._v2 else _TYPES
        for key, kind in types.items():
            if not isinstance(row[key], kind) or isinstance(row[key], bool):
                return f"{key} is {json.dumps(row[key])[:40]}, not of type {kind.__name__}."
        if not self._v2 and row["length"].bit_length() > 63:
            return "length does not fit into 64 bits."
        if not _strings(row["answers"]) or not row["answers"]:
            return "answers is not a list of at least one string."
        if row["all_classes"] is not None and not _strings(row["all_classes"]):
            return "all_classes is neither null nor a list of strings."
        if not _encodable(row):
            return "a string holds a lone surrogate."
        if row["dataset"] != self._stem:
            return f"the row belongs to dataset {row['dataset']!r}, not {self._stem!r}."
        if self._fill and self._task.metric == "classification" and not row["all_classes"]:
            return (
                f"all_classes is empty, and the scores of {self._stem} need the names of the classes. State them, or "
                f"choose other --datasets."
            )
        place = self._places.get(row["_id"])
        return f"_id {row['_id']!r} is already in {place}." if place else None


def _find_v2_problem(record: dict[str, Any]) -> str | None:
    if missing := _find_missing(record, _V2_TEXTS):
        return missing
    for key in _V2_TEXTS:
        if not isinstance(record[key], str):
            return f"{key} is {json.dumps(record[key])[:40]}, not of type str."
        if key in _ALLOWED and record[key] not in _ALLOWED[key]:
            return f"{key} is {short(record[key], 40)!r}; it must be {' or '.join(_ALLOWED[key])}."
    return None


def _v2_row(record: dict[str, Any], stem: str) -> dict[str, Any]:
    """Return a question of LongBench v2 as a row.

    The official code replaces the placeholders of its template one after the other, so a `$Q$` in the context becomes
    the question, too. The texts of the row are as that code leaves them.
    """
    texts = {
        "$DOC$": record["context"].strip(),
        "$Q$": record["question"].strip(),
        **{f"$C_{key[-1]}$": record[key].strip() for key in CHOICE_FIELDS},
    }
    marks = list(texts)
    for at, mark in enumerate(marks):
        for later in marks[at + 1 :]:
            texts[mark] = texts[mark].replace(later, _unfilled(record, later))
    context, question, *choices = texts.values()
    return {
        "context": context,
        "input": question,
        **dict(zip(CHOICE_FIELDS, choices, strict=True)),
        "answers": [record["answer"]],
        "length": record["length"],
        "difficulty": record["difficulty"],
        "dataset": stem,
        "language": "en",
        "all_classes": None,
        "_id": record["_id"],
    }


def _unfilled(record: dict[str, Any], mark: str) -> str:
    text: str = record["question" if mark == "$Q$" else f"choice_{mark[3]}"]
    return text.strip()


def _find_missing(row: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    missing = [key for key in keys if key not in row]
    return f"the row lacks {', '.join(missing)}." if missing else None


def _encodable(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
