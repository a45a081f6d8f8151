"""The English words of RULER: the word lists of the package wonderwords, which RULER itself uses."""

from functools import cache
from importlib.resources import files
from importlib.util import find_spec

from sparsecache.errors import UsageError

_PACKAGE = "wonderwords"


def check_words(tasks: str) -> None:
    """Raise UsageError, naming the tasks that need them, if the word lists are not installed."""
    if find_spec(_PACKAGE) is None:
        raise UsageError(
            f"The English words for {tasks} are missing. Install the package {_PACKAGE}: pip install -c "
            f"constraints.txt -e '.[ruler]'"
        )


@cache
def nouns() -> list[str]:
    """Return the nouns, such as `harbor`, in alphabetical order."""
    return _read("nounlist.txt")


@cache
def adjectives() -> list[str]:
    """Return the adjectives, such as `quiet`, in alphabetical order."""
    return _read("adjectivelist.txt")


@cache
def all_words() -> list[str]:
    """Return all nouns, adjectives and verbs once each, in alphabetical order."""
    return sorted({*nouns(), *adjectives(), *_read("verblist.txt")})


def _read(name: str) -> list[str]:
    text = files(_PACKAGE).joinpath("assets", name).read_text(encoding="utf-8")
    return sorted({word for line in text.splitlines() if (word := line.strip())})
