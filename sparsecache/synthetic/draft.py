"""Drafts of rows, a reproducible random source, and helpers that fill a token budget.

This module is independent of datasets and languages.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

CHARS_PER_TOKEN = 4.0
_OPEN, _CLOSE = "\x02", "\x03"

QAPair = tuple[str, str]  # a row's `input` and its answer


@dataclass(frozen=True)
class Draft:
    """What a dataset's generator writes: a row without dataset name, language and length.

    `context` and `input` may contain marks (see `mark`). `follow_ups` yields more questions about the same context,
    lazily; for some datasets it is infinite. Rows do not use marks and follow-ups; training does.
    """

    context: str
    input: str
    answers: list[str]
    all_classes: list[str] | None = None
    follow_ups: Iterator[QAPair] = field(default_factory=lambda: iter(()))


def mark(text: str) -> str:
    """Mark text that the text before it determines, so that a trained model can predict it."""
    return f"{_OPEN}{text}{_CLOSE}"


def strip_marks(text: str) -> str:
    """Return the text without its marks."""
    return text.replace(_OPEN, "").replace(_CLOSE, "")


def split_marks(text: str) -> Iterator[tuple[str, bool]]:
    """Return the non-empty pieces of a text in order, each with whether it was marked.

    A marked piece includes the space before it and the newlines after it.
    """
    text = text.replace(f" {_OPEN}", f"{_OPEN} ")
    while f"{_CLOSE}\n" in text:
        text = text.replace(f"{_CLOSE}\n", f"\n{_CLOSE}")
    for part in text.split(_OPEN):
        marked, _, rest = part.rpartition(_CLOSE)
        yield from ((piece, flag) for piece, flag in ((marked, True), (rest, False)) if piece)


class Rng:
    """Random choices that depend only on the seed, not on the process or the Python version.

    It uses only `random.Random.random`, whose sequence Python guarantees to keep.
    """

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed).random

    def randbelow(self, bound: int) -> int:
        """Return an integer from 0 to bound - 1."""
        return int(self.random() * bound)

    def randint(self, low: int, high: int) -> int:
        """Return an integer from low to high, both included."""
        return low + self.randbelow(high - low + 1)

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def choice(self, items: Sequence[T]) -> T:
        return items[self.randbelow(len(items))]

    def shuffled(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items in random order."""
        left = list(items)
        while left:
            yield left.pop(self.randbelow(len(left)))

    def sample(self, items: Iterable[T], count: int) -> list[T]:
        """Return up to `count` of the items in random order, without replacement."""
        return list(islice(self.shuffled(items), count))

    def unique(self, make: Callable[["Rng"], str], used: set[str]) -> str:
        """Return a value of `make` that is not in `used`; adds it to `used`.

        Does not return if `used` holds every value of `make`: keep `used` small against the inventory.
        """
        while (value := make(self)) in used:
            pass
        used.add(value)
        return value

    def insert(self, items: list[T], *extra: T) -> None:
        """Insert `extra` into `items` at uniform random positions, in the order of `extra`."""
        positions = sorted(self.randbelow(len(items) + 1) for _ in extra)
        for position, item in reversed(list(zip(positions, extra, strict=True))):
            items.insert(position, item)


def estimate_tokens(text: str) -> float:
    """Return an estimated number of tokens: one per 4 ASCII characters, one per other character."""
    narrow = len(text.encode("ascii", "ignore"))
    return narrow / CHARS_PER_TOKEN + (len(text) - narrow)


def fill(tokens: float, make: Callable[[], T]) -> list[T]:
    """Call `make` until the results, as text with a space after each, come nearest to `tokens`."""
    pieces: list[T] = []
    while True:
        piece = make()
        cost = estimate_tokens(f"{piece} ")
        if cost > 2 * tokens:
            return pieces
        pieces.append(piece)
        tokens -= cost


def write_parts(tokens: float, writers: Sequence[Callable[[float], str]]) -> list[str]:
    """Return one text per writer.

    Each writer gets an equal share of the tokens that are left when it is called.
    """
    texts: list[str] = []
    for index, write in enumerate(writers):
        texts.append(write(tokens / (len(writers) - index)))
        tokens -= estimate_tokens(texts[-1])
    return texts


def num_parts(tokens: float, tokens_per_part: float, minimum: int, maximum: int) -> int:
    """Return how many parts of about `tokens_per_part` fit into `tokens`, within the limits."""
    return max(minimum, min(maximum, round(tokens / tokens_per_part)))


def join_paragraphs(rng: Rng, sentences: Sequence[str], separator: str) -> str:
    """Join the sentences into paragraphs of 3 to 8, one paragraph per line."""
    lines: list[str] = []
    start = 0
    while start < len(sentences):
        end = start + rng.randint(3, 8)
        lines.append(separator.join(sentences[start:end]))
        start = end
    return "\n".join(lines)
