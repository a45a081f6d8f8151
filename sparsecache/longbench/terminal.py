"""Text from data on a terminal: nothing that the terminal acts on, as wide as it really is, cut where it is long."""

import unicodedata
from itertools import accumulate

_SIGNS = {"\n": "⏎", "\t": "⇥"}
_ACTIVE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (direction marks too), lone surrogates, line separators


def visible(text: str) -> str:
    """The text as one line in which nothing is hidden and nothing moves the cursor or changes its colours.

    A line's end is shown as ⏎, a tab as ⇥, any other such character as Python's escape (`\\x1b`, `\\u202e`).
    """
    if text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def width(text: str) -> int:
    """How many columns of a terminal a text takes: two for a Chinese character, none for a combining mark."""
    return len(text) if text.isascii() else sum(map(_columns, text))


def pad(text: str, columns: int, right: bool = False) -> str:
    """The text with spaces up to `columns`: behind it, or before it with `right`."""
    space = " " * (columns - width(text))
    return space + text if right else text + space


def cut(text: str, columns: int) -> str:
    """The text, or its two ends within `columns` with a mark between them that says how much is left out."""
    if width(text) <= columns:
        return text
    head = sum(taken <= columns - columns // 2 for taken in accumulate(map(_columns, text)))
    tail = sum(taken <= columns // 2 for taken in accumulate(map(_columns, reversed(text))))
    return f"{text[:head]} [... {len(text) - head - tail} characters ...] {text[len(text) - tail :]}"


def _shown(character: str) -> str:
    if unicodedata.category(character) not in _ACTIVE and not _no_character(ord(character)):
        return character
    return _SIGNS.get(character) or character.encode("unicode_escape").decode()


def _no_character(point: int) -> bool:
    """Whether Unicode says that a code point is no character, which neither XML nor HTML allows."""
    return point & 0xFFFE == 0xFFFE or 0xFDD0 <= point <= 0xFDEF


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
