"""Needles in a haystack: sentences with a key and a value, hidden in noise, essays, or other such sentences."""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from sparsecache.ruler.draft import Draft, distinct_places, letters, sample
from sparsecache.ruler.words import adjectives, nouns
from sparsecache.synthetic.draft import Rng

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The sentences that fill a context of noise, one line each time."""
_DEPTHS = [round(100 * step / 39) for step in range(40)]  # percent of the sentences of an essay
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]* ")


@dataclass(frozen=True)
class Needles:
    """One of the eight tasks: its haystack, the kinds of keys and values, and their numbers.

    keys: needles with different keys. values: needles per key. queries: keys that the question asks for. essay: the
    words of the essays, for a haystack of essays.
    """

    haystack: Literal["noise", "essay", "needle"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    essay: tuple[str, ...] = ()

    def make(self, rng: Rng, size: int) -> Draft:
        """Return a row whose haystack has `size` sentences of noise, needles, or words of essays."""
        used: set[str] = set()
        pairs = [
            (key, [self._value(rng) for _ in range(self.values)])
            for key in (rng.unique(self._key, used) for _ in range(self.keys))
        ]
        needles = sample(rng, (self._needle(key, value) for key, values in pairs for value in values))
        asked = sample(rng, pairs, self.queries)
        if self.haystack == "essay":
            context = self._in_essay(rng, needles, size)
        else:
            context = "\n".join(self._among_lines(rng, needles, size, used))
        *first, last = (key for key, _ in asked)
        query = f"{', '.join(first)}, and {last}" if first else last
        return Draft(context, query, [value for _, values in asked for value in values])

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value} for {key} is: {value}."

    def _key(self, rng: Rng) -> str:
        return _uuid(rng) if self.key == "uuids" else f"{rng.choice(adjectives())}-{rng.choice(nouns())}"

    def _value(self, rng: Rng) -> str:
        return _uuid(rng) if self.value == "uuids" else str(rng.randint(1_000_000, 9_999_999))

    def _among_lines(self, rng: Rng, needles: list[str], size: int, used: set[str]) -> list[str]:
        lines = [
            NOISE if self.haystack == "noise" else self._needle(rng.unique(self._key, used), self._value(rng))
            for _ in range(size)
        ]
        for place, needle in zip(reversed(distinct_places(rng, size, len(needles))), needles, strict=True):
            lines.insert(place, needle)
        return lines

    def _in_essay(self, rng: Rng, needles: list[str], size: int) -> str:
        repeats = -(-size // len(self.essay))
        sentences = _sentences(" ".join((self.essay * repeats)[:size]))
        depths = sorted(sample(rng, _DEPTHS, len(needles)), reverse=True)
        places = [len(sentences) * depth // 100 for depth in depths]
        for place, needle in zip(places, needles, strict=True):
            sentences.insert(place, needle)
        return " ".join(sentences)


def _sentences(text: str) -> list[str]:
    """Return the sentences of a text in which single spaces separate words."""
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    return [text[start:end].rstrip(" ") for start, end in pairwise(ends) if start < end]


def _uuid(rng: Rng) -> str:
    """Return a random UUID of version 4."""
    digits = letters(rng, "0123456789abcdef", 32)
    variant = rng.choice("89ab")
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"
