"""The one exception that is meant for users, and the words of its messages."""

from collections.abc import Iterable


class UsageError(Exception):
    """Something the user can put right: a full sentence with the value, what is allowed and the way out.

    The command lines print it and exit with code 2; nothing else in the project is caught there.
    """


def short(value: object, most: int = 60) -> str:
    """A value for a message, as Python writes it, cut after `most` characters."""
    try:
        text = str(value) if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits; nested too deeply
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= most else f"{text[:most]}..."


def listed(names: Iterable[str], most: int = 10, none: str = "nothing") -> str:
    """Names for a message, with commas between: the first `most`, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(short(name) for name in names[:most]) or none) + more


def one_line(error: BaseException) -> str:
    """Another library's error as part of a sentence."""
    return " ".join(str(error).split()) or type(error).__name__
