"""Summary-level ROUGE-L as the package `rouge` 1.0.1 has it: the same digits, by rows of bits instead of tables.

Published tables were made with https://github.com/pltrdy/rouge, so what is odd about it stays: sentences end at every
".", a blank one holds one empty word, and a word counts once, however often it stands in a text. For each sentence of
the answer and each of the prediction it fills the table T of longest common subsequences, T[i, j] for the first i
words of the one and the first j of the other, and walks back from its end, one call deeper with each step: diagonally
on equal words, else up (i - 1) where T is larger than to the left (j - 1). The words of all diagonal steps count.

Here a row of T is an integer with a bit for each j, set where T[i, j] exceeds T[i, j - 1]: on unequal words, that is
where a walk goes up. The sentences of the prediction lie side by side in it, and all their walks go at once.
"""

import functools
import operator
from collections.abc import Iterator, Sequence
from itertools import chain

_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_ROWS_KEPT = 64  # of a table; those before are made again when the walk gets there
_PARTS = 64
_CACHED_BYTES = 2**25  # of words' bits

_Sentence = tuple[str, ...]


def rouge_l(prediction: str, answer: str, most_steps: int) -> tuple[float, bool]:
    """The F value, and whether a walk takes more than `most_steps` steps.

    Raises ValueError for a text without a sentence ("", "." and the like).
    """
    predicted, wanted = _sentences(prediction), _sentences(answer)
    if not predicted or not wanted:
        raise ValueError("ROUGE-L needs a sentence in both texts.")
    walks = _Walks(predicted)
    common: set[str] = set().union(*(walks.walk(sentence)[0] for sentence in wanted))
    recall, precision = (len(common) / len(set(chain.from_iterable(text))) for text in (wanted, predicted))
    f = 2.0 * ((precision * recall) / (precision + recall + 1e-8))
    return f, _any_longer(most_steps, predicted, wanted)


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence of two lists of words."""
    return _Walks([tuple(first)]).common_length(tuple(second)) if first and second else 0


def _sentences(text: str) -> list[_Sentence]:
    """Each sentence once, since a repeated one changes nothing."""
    return list(dict.fromkeys(tuple(part.split()) or ("",) for part in text.split(".") if part))


def _any_longer(most_steps: int, predicted: Sequence[_Sentence], wanted: Sequence[_Sentence]) -> bool:
    return any(
        _Walks([other]).walk(sentence)[1] > most_steps
        for sentence in wanted
        for other in predicted
        if len(sentence) + len(other) > most_steps  # no walk takes more than that
    )


class _Walks:
    """The walks through the tables of any sentence (down) and some sentences side by side (across).

    Bits: a border, then for each sentence across its words and another border. A walk that leaves its table on the
    left stays on the border there. Memory is linear in the texts: a word's bits are made from its places when they
    are needed, since a row of bits for each distinct word would be quadratic.
    """

    def __init__(self, across: Sequence[_Sentence]) -> None:
        self._places: dict[str, list[int]] = {}  # of each word
        borders, at = [0], 1
        for sentence in across:
            for word in sentence:
                self._places.setdefault(word, []).append(at)
                at += 1
            borders.append(at)
            at += 1
        self._nbytes = (at + 7) // 8
        border_bits = self._bits(borders)
        self._words = (1 << at) - 1 ^ border_bits
        self._words_mirrored, self._borders_mirrored = self._mirror(self._words), self._mirror(border_bits)
        self._most_cached = _CACHED_BYTES // self._nbytes
        self._cached: dict[str, int] = {}
        self._cached_mirrored: dict[str, int] = {}

    def walk(self, down: _Sentence) -> tuple[set[str], int]:
        """The words of all diagonal steps; the number of steps, if there is but one sentence across."""
        words, borders = self._words_mirrored, self._borders_mirrored
        here = last = borders << 1 & words  # the last word of each sentence
        common: set[str] = set()
        rows = diagonal = 0
        for word, larger in self._rows_from_the_end(self._words, down):
            equal = self._matches_mirrored(word)
            stops = larger | equal | borders
            here = (words & ~stops) + here & stops  # the sum carries each walk to the left up to its next stop
            if not here & words:
                break
            rows += 1
            if found := here & equal:
                common.add(word)
                diagonal += 1
                here += found  # one more to the left
        columns = here.bit_length() - last.bit_length()
        return common, rows + columns - diagonal

    def common_length(self, down: _Sentence) -> int:
        """The length of the longest common subsequence, if there is but one sentence across."""
        return (self._words ^ self._last_row(self._words, down)).bit_count()

    def _rows_from_the_end(self, top: int, down: _Sentence) -> Iterator[tuple[str, int]]:
        """For each word down, from the last: the word, and mirrored, where its row of T grows. `top`: the row above.

        Holds _ROWS_KEPT rows and _PARTS rows for each level of parts within parts, not every row.
        """
        if len(down) <= _ROWS_KEPT:
            before, larger = self._words, 0
            for word, row in zip(reversed(down), reversed(list(self._rows(top, down))), strict=True):
                if row != before:
                    before, larger = row, self._mirror(self._words ^ row)
                yield word, larger
            return
        size = max(_ROWS_KEPT, -(-len(down) // _PARTS))
        parts = [down[at : at + size] for at in range(0, len(down), size)]
        tops = [top]
        for part in parts[:-1]:
            tops.append(self._last_row(tops[-1], part))
        for above, part in zip(reversed(tops), reversed(parts), strict=True):
            yield from self._rows_from_the_end(above, part)

    def _rows(self, top: int, down: _Sentence) -> Iterator[int]:
        """The rows below `top`, one for each word down; set are the words where T does not grow.

        Hyyro's recurrence (2004): a sum carries each match on to the end of its run of columns without growth.
        """
        row = top
        for word in down:
            if match := row & self._matches(word):
                row = (row + match | row - match) & self._words
            yield row

    def _last_row(self, top: int, down: _Sentence) -> int:
        row = top
        for row in self._rows(top, down):  # noqa: B007 (the last one is wanted)
            pass
        return row

    def _matches(self, word: str) -> int:
        """Where the word stands across."""
        if word in self._cached:
            return self._cached[word]
        bits = self._bits(self._places.get(word, ()))
        if len(self._cached) < self._most_cached:
            self._cached[word] = bits
        return bits

    def _matches_mirrored(self, word: str) -> int:
        if word in self._cached_mirrored:
            return self._cached_mirrored[word]
        bits = self._mirror(self._matches(word)) if word in self._places else 0
        if len(self._cached_mirrored) < self._most_cached:
            self._cached_mirrored[word] = bits
        return bits

    def _bits(self, places: Sequence[int]) -> int:
        if len(places) < 4:
            return functools.reduce(operator.or_, (1 << place for place in places), 0)
        content = bytearray(self._nbytes)
        for place in places:
            content[place >> 3] |= 1 << (place & 7)
        return int.from_bytes(content, "little")

    def _mirror(self, bits: int) -> int:
        """The same bits from the other end: a sum carries to higher bits, and the walks go to lower columns."""
        return int.from_bytes(bits.to_bytes(self._nbytes, "little").translate(_MIRRORED), "big")
