"""What every maker of sample rows uses: a stable random source, the token estimate, and sharing out the room.

It does not know any dataset or language.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

CHARACTERS_PER_TOKEN = 4.0
WIDE_CHARACTERS_PER_TOKEN = 1.0
_OPEN, _CLOSE = "\x02", "\x03"

Question = tuple[str, str]  # a row's input, and the answer to it


@dataclass(frozen=True)
class Draft:
    """The part of a row that a maker writes: the row's own fields, without name, language and counts.

    `context` and `input` may hold marks (see `mark`). `more` gives further questions about the same context,
    each made when it is asked for, without end for some datasets.
    """

    context: str
    input: str
    answers: list[str]
    all_classes: list[str] | None = None
    more: Iterator[Question] = field(default_factory=lambda: iter(()))


def mark(text: str) -> str:
    """The text between two marks that say: what stands before settles it. A row is shown without marks."""
    return f"{_OPEN}{text}{_CLOSE}"


def unmarked(text: str) -> str:
    """The text without its marks."""
    return text.replace(_OPEN, "").replace(_CLOSE, "")


def split_marks(text: str) -> Iterator[tuple[str, bool]]:
    """The pieces of a text in order, none empty, and whether each was marked.

    A marked piece takes along the blank before it and the line ends after it.
    """
    text = text.replace(f" {_OPEN}", f"{_OPEN} ")
    while f"{_CLOSE}\n" in text:
        text = text.replace(f"{_CLOSE}\n", f"\n{_CLOSE}")
    for part in text.split(_OPEN):
        settled, _, rest = part.rpartition(_CLOSE)
        yield from ((piece, flag) for piece, flag in ((settled, True), (rest, False)) if piece)


class Rng:
    """Random choices that are the same in every process and Python version for one seed string.

    Only `random.Random.random` is used: its sequence is the one that Python promises to keep.
    """

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed).random

    def below(self, bound: int) -> int:
        """An integer from 0 to bound - 1."""
        return int(self.random() * bound)

    def span(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def drawn(self, items: Iterable[T]) -> Iterator[T]:
        """The items in random order, each once."""
        left = list(items)
        while left:
            yield left.pop(self.below(len(left)))

    def several(self, items: Iterable[T], count: int) -> list[T]:
        """`count` of the items, each at most once, in random order; fewer if there are fewer."""
        return list(islice(self.drawn(items), count))

    def fresh(self, make: Callable[["Rng"], str], used: set[str]) -> str:
        """A value of `make` that is not in `used`; it is added there.

        It never returns once `used` holds all that `make` can give: keep `used` small against the inventory.
        """
        while (value := make(self)) in used:
            pass
        used.add(value)
        return value

    def insert(self, items: list[T], *extra: T) -> None:
        """Put each of `extra` into `items` at a uniform position of its own, their order kept."""
        places = sorted(self.below(len(items) + 1) for _ in extra)
        for place, item in reversed(list(zip(places, extra, strict=True))):
            items.insert(place, item)


def estimate_tokens(text: str) -> float:
    """Estimated tokens of a text: one per 4 ASCII characters, one for every other one (Chinese and its marks)."""
    narrow = len(text.encode("ascii", "ignore"))
    return narrow / CHARACTERS_PER_TOKEN + (len(text) - narrow) / WIDE_CHARACTERS_PER_TOKEN


def fill(room: float, make: Callable[[], T]) -> list[T]:
    """Pieces of `make` that come nearest to `room` tokens in all, a blank after the `str` of each counted."""
    pieces: list[T] = []
    while True:
        piece = make()
        cost = estimate_tokens(f"{piece} ")
        if cost > 2 * room:
            return pieces
        pieces.append(piece)
        room -= cost


def share(room: float, writers: Sequence[Callable[[float], str]]) -> list[str]:
    """One text per writer; each is given an equal share of the tokens that those before it left over."""
    texts: list[str] = []
    for index, write in enumerate(writers):
        texts.append(write(room / (len(writers) - index)))
        room -= estimate_tokens(texts[-1])
    return texts


def parts(room: float, tokens_each: float, least: int, most: int) -> int:
    """How many parts of about `tokens_each` tokens fit `room`, held between `least` and `most`."""
    return max(least, min(most, round(room / tokens_each)))


def paragraphs(rng: Rng, sentences: Sequence[str], blank: str, most: int = 8) -> str:
    """The sentences, joined by `blank`, with a new line after every few of them (at most `most`)."""
    lines: list[str] = []
    start = 0
    while start < len(sentences):
        end = start + rng.span(3, most)
        lines.append(blank.join(sentences[start:end]))
        start = end
    return "\n".join(lines)
