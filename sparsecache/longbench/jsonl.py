"""JSON Lines with errors that name the file, the line and what to do. Lines end at \\n and nowhere else."""

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jsonlines

from sparsecache.errors import UsageError


def read_objects(lines: Iterable[bytes], name: str, advice: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) for every line that is not blank.

    `lines` are bytes, as a file opened in binary mode yields them: split on newlines only, since real rows
    hold raw U+0085, U+2028 and carriage returns. Raises UsageError, naming `name` and the line and ending in
    `advice`, for a line that is not one whole JSON object in UTF-8.
    """
    number = 0

    def counted() -> Iterator[bytes]:
        nonlocal number
        for number, line in enumerate(lines, 1):  # noqa: B007 (read by whoever reports an error)
            yield line

    reader = jsonlines.Reader(counted(), loads=json.loads)  # its default is whichever JSON package is installed
    while True:
        try:
            record = reader.read(type=dict, skip_empty=True)
        except EOFError:
            return
        except (jsonlines.InvalidLineError, RecursionError) as error:
            raise UsageError(f"{name}, line {number}: {error}. {advice}") from error
        yield number, record


def dumps(record: dict[str, Any]) -> str:
    """One line of strict JSON: characters as themselves, escapes only where UTF-8 cannot hold them.

    Raises ValueError on NaN or infinity, which are not JSON.
    """
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return json.dumps(record, allow_nan=False)
    return text


def figure(record: dict[str, Any], key: str) -> float | None:
    """A record's number; None for anything else, as files from elsewhere may hold."""
    value = record.get(key)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None
