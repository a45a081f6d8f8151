"""Drafts of rows, and random choices of many items."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from sparsecache.synthetic.draft import Rng

T = TypeVar("T")


@dataclass(frozen=True)
class Draft:
    """The part of a row that a generator writes.

    context: the long text. input: what the question asks about. answers: what is to be found. examples: a solved
    example before the question.
    """

    context: str
    input: str
    answers: list[str]
    examples: str = ""


def sample(rng: Rng, items: Iterable[T], count: int | None = None) -> list[T]:
    """Return `count` different items (None: all) in random order, by exchanges in place (Fisher and Yates)."""
    items = list(items)
    count = len(items) if count is None else min(count, len(items))
    for at in range(count):
        other = at + rng.randbelow(len(items) - at)
        items[at], items[other] = items[other], items[at]
    return items[:count]


def distinct_places(rng: Rng, bound: int, count: int) -> list[int]:
    """Return `count` different whole numbers from 0 to bound - 1, in ascending order."""
    found: set[int] = set()
    while len(found) < count:
        found.add(rng.randbelow(bound))
    return sorted(found)


def letters(rng: Rng, alphabet: str, length: int) -> str:
    """Return a random word over an alphabet."""
    return "".join(rng.choice(alphabet) for _ in range(length))


def numbered(items: Iterable[str]) -> str:
    """Return the items as `1. first 2. second`."""
    return " ".join(f"{number}. {item}" for number, item in enumerate(items, 1))
