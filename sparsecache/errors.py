"""The exception for errors of the user, and helpers for its messages."""

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(Exception):
    """An error that the user can correct. Its message states the value, what is allowed and how to correct it.

    The command lines print the message and exit with code 2.
    """


def short(value: object, most: int = 60) -> str:
    """Returns a value for a message, as Python writes it, cut after `most` characters."""
    try:
        text = str(value) if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits; nested too deeply
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= most else f"{text[:most]}..."


def listed(names: Iterable[str], most: int = 10, none: str = "nothing", whole: bool = False) -> str:
    """Returns the first `most` names for a message, separated by commas, and the number of the others.

    whole: whether long names are given in full.
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(name if whole else short(name) for name in names[:most]) or none) + more


def did_you_mean(name: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> str:
    """Returns how a message goes on after a name that does not exist; nothing if no known name is like it.

    most: the most names to propose. cutoff: how like it a name must be, from 0 to 1 (`difflib.get_close_matches`).
    """
    near = get_close_matches(name, list(known), most, cutoff)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def one_line(error: BaseException) -> str:
    """Returns the message of another library's error on one line."""
    return " ".join(str(error).split()) or type(error).__name__
