"""Reads and writes JSON and JSON Lines. Errors name the file, the line and the fix.

Readers accept strict JSON only: no NaN, no infinity (including `1e999`), at most 100 digits per whole number and 50
levels of nesting. Later code therefore never meets a value that arithmetic or JSON cannot hold.
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

_MAX_BYTES = 2**28  # per JSON file and per line
_MAX_DIGITS = 100
_TOO_LARGE = 10**_MAX_DIGITS
_MAX_DEPTH = 50
_MAX_NUMBER = 1e15  # keeps sums and ratios of measured numbers finite


def read_objects(lines: Iterable[bytes], name: str, advice: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for every line that is not blank.

    `lines`: a file opened in binary mode, or its lines. Only \\n ends a line, because real rows hold raw U+0085, U+2028
    and carriage returns. Raises UsageError for a line that is not one JSON object in UTF-8; the message has `name`, the
    line number and `advice`.
    """
    number = 0

    def counted() -> Iterator[bytes]:
        nonlocal number
        for number, line in enumerate(_bounded(lines), 1):  # noqa: B007 (read in error messages)
            yield line

    reader = jsonlines.Reader(counted(), loads=loads)  # the default may be another JSON package
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
    """Read one JSON value from a regular file.

    Raises UsageError if the file cannot be read, and ValueError if it is not strict JSON in UTF-8.
    """
    content = read_file(path, _MAX_BYTES)
    try:
        return loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def loads(text: str | bytes) -> Any:
    """Parse strict JSON.

    Raises ValueError for anything else, RecursionError for very deep nesting.
    """
    value = json.loads(text, parse_constant=_refuse_constant)
    _check(value)
    return value


def dumps(record: dict[str, Any]) -> str:
    """Format a record as one line of strict JSON. Only lone surrogates are escaped.

    Raises ValueError for a value that `loads` would refuse.
    """
    _check(record)
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace").decode()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value, indented; NaN and infinity become null. Raises as `write_atomically`."""
    write_atomically(path, json.dumps(_without_nan(value), ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def get_number(record: dict[str, Any], key: str) -> float | None:
    """Return a number of a record; None for another type, and for a number beyond ±1e15."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= _MAX_NUMBER else None  # also None for NaN


class _LineTooLongError(Exception):
    """A line is longer than this many bytes."""


def _bounded(lines: Iterable[bytes]) -> Iterator[bytes]:
    if not hasattr(lines, "readline"):
        yield from lines
        return
    file: BinaryIO = lines  # type: ignore[assignment]
    while line := file.readline(_MAX_BYTES + 1):
        if len(line) > _MAX_BYTES:
            raise _LineTooLongError(f"{_MAX_BYTES:,}")
        yield line


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


def _check(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        parts: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                parts += each.values()
            elif isinstance(each, list | tuple):
                parts += each
            elif isinstance(each, float) and not math.isfinite(each):
                raise ValueError("a number is infinite or NaN, which is not valid JSON")
            elif isinstance(each, int) and abs(each) >= _TOO_LARGE:
                raise ValueError(f"a whole number has more than {_MAX_DIGITS} digits")
        if not parts:
            return
        level = parts
    raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")


def _without_nan(value: Any) -> Any:
    """Return a JSON value with null for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
