"""Prepares text for a terminal: escapes control characters, measures width, shortens."""

import unicodedata
from itertools import accumulate

_SIGNS = {"\n": "⏎", "\t": "⇥"}
_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (direction marks too), lone surrogates, line separators


def escape_control_chars(text: str) -> str:
    """Return text as one line in which every control and formatting character is escaped.

    A newline becomes ⏎, a tab ⇥, and any other one Python's escape (`\\x1b`, `\\u202e`).
    """
    if text.isprintable():
        return text
    return "".join(_escape(character) for character in text)


def display_width(text: str) -> int:
    """Return the terminal columns of a text: two per Chinese character, none per combining mark."""
    return len(text) if text.isascii() else sum(map(_columns, text))


def pad(text: str, columns: int, right: bool = False) -> str:
    """Return text padded with spaces to `columns`, on the right, or on the left with `right`."""
    space = " " * (columns - display_width(text))
    return space + text if right else text + space


def truncate_middle(text: str, columns: int) -> str:
    """Return text, shortened to its two ends within `columns` if it is wider."""
    if display_width(text) <= columns:
        return text
    head = sum(taken <= columns - columns // 2 for taken in accumulate(map(_columns, text)))
    tail = sum(taken <= columns // 2 for taken in accumulate(map(_columns, reversed(text))))
    return f"{text[:head]} [... {len(text) - head - tail} characters ...] {text[len(text) - tail :]}"


def _escape(character: str) -> str:
    if unicodedata.category(character) not in _ESCAPED and not _is_noncharacter(ord(character)):
        return character
    return _SIGNS.get(character) or character.encode("unicode_escape").decode()


def _is_noncharacter(point: int) -> bool:
    """Return whether a code point is a Unicode noncharacter, which neither XML nor HTML allows."""
    return point & 0xFFFE == 0xFFFE or 0xFDD0 <= point <= 0xFDEF


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
