"""Reads and writes JSON and JSON Lines. Errors name the file, the line and what to do. Lines end at \\n only.

Readers accept strict JSON only: no NaN, no infinity (`1e999` is one), no number of more than 100 digits, no nesting
deeper than 50. So no later step meets a value that arithmetic or JSON cannot hold.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jsonlines

from sparsecache.errors import UsageError, one_line
from sparsecache.files import read_file, reason, write_atomically

_MOST_BYTES = 2**28  # of a JSON file, and of a line
_MOST_DIGITS = 100
_TOO_LARGE = 10**_MOST_DIGITS
_DEEPEST = 50
_MOST = 1e15  # of a measured number: sums and ratios of these stay finite


def read_objects(lines: Iterable[bytes], name: str, advice: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) for every line that is not blank.

    `lines`: a file opened in binary mode, or its lines. They are split on newlines only, since real rows hold raw
    U+0085, U+2028 and carriage returns. Raises UsageError, naming `name` and the line and ending in `advice`, for a
    line that is not one whole JSON object in UTF-8.
    """
    number = 0

    def counted() -> Iterator[bytes]:
        nonlocal number
        for number, line in enumerate(_bounded(lines), 1):  # noqa: B007 (read where an error is reported)
            yield line

    reader = jsonlines.Reader(counted(), loads=loads)  # its default is whichever JSON package is installed
    while True:
        try:
            record = reader.read(type=dict, skip_empty=True)
        except EOFError:
            return
        except (jsonlines.InvalidLineError, RecursionError) as error:
            raise UsageError(f"{name}, line {number}: {one_line(error)}. {advice}") from error
        except _LineTooLongError as error:
            raise UsageError(f"{name}, line {number + 1}: the line is longer than {error} bytes. {advice}") from error
        except OSError as error:
            raise UsageError(f"Could not read {name} after line {number}: {reason(error)}.") from error
        yield number, record


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads one JSON value from a regular file. Raises UsageError for a file that cannot be read, ValueError for one
    that is not strict JSON in UTF-8.
    """
    content = read_file(path, _MOST_BYTES)
    try:
        return loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def loads(text: str | bytes) -> Any:
    """Parses strict JSON. Raises ValueError for anything else, RecursionError for very deep nesting."""
    value = json.loads(text, parse_constant=_refuse_constant)
    _check(value)
    return value


def dumps(record: dict[str, Any]) -> str:
    """Formats a record as one line of strict JSON: characters as themselves, half surrogate pairs as escapes.

    Raises ValueError for what `loads` would refuse.
    """
    _check(record)
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace").decode()


def write_json(path: Path, value: Any) -> None:
    """Replaces a file by a JSON value, indented; NaN and infinity become null. Raises as `write_atomically`."""
    write_atomically(path, json.dumps(_without_nan(value), ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def figure(record: dict[str, Any], key: str) -> float | None:
    """Returns a record's number; None for anything else, and for one too large to calculate with."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= _MOST else None  # False for NaN, too


class _LineTooLongError(Exception):
    """A line longer than this many bytes."""


def _bounded(lines: Iterable[bytes]) -> Iterator[bytes]:
    if not hasattr(lines, "readline"):
        yield from lines
        return
    file: BinaryIO = lines  # type: ignore[assignment]
    while line := file.readline(_MOST_BYTES + 1):
        if len(line) > _MOST_BYTES:
            raise _LineTooLongError(f"{_MOST_BYTES:,}")
        yield line


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _check(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        parts: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                parts += each.values()
            elif isinstance(each, list | tuple):
                parts += each
            elif isinstance(each, float) and not math.isfinite(each):
                raise ValueError("a number is too large, or is no JSON (NaN, Infinity)")
            elif isinstance(each, int) and abs(each) >= _TOO_LARGE:
                raise ValueError(f"a whole number is too large; at most {_MOST_DIGITS} digits are read")
        if not parts:
            return
        level = parts
    raise ValueError(f"nested deeper than {_DEEPEST} levels")


def _without_nan(value: Any) -> Any:
    """Returns a JSON value with null in place of NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
