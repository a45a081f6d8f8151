"""Summary-level ROUGE-L, equal to the package `rouge` 1.0.1 but in linear memory.

The published tables were made with https://github.com/pltrdy/rouge, so its oddities are kept: every "." ends a
sentence, a blank sentence holds one empty word, and a repeated word counts once. For every pair of an answer sentence
and a predicted sentence, it fills the table T of longest common subsequences, T[i, j] for the first i and the first j
words. It then traces back from the end, one recursive call per step: diagonally on equal words, else up (i - 1) if T is
larger there than to the left (j - 1). The words of all diagonal steps count.

Here a row of T is an integer with one bit per j, set if T[i, j] > T[i, j - 1]. On unequal words, the trace goes up at a
set bit. The predicted sentences are concatenated in the columns, and their traces advance in parallel.
"""

import functools
import operator
from collections.abc import Iterator, Sequence
from itertools import chain

_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_ROWS_KEPT = 64  # earlier rows of a table are computed again when the trace reaches them
_PARTS = 64
_CACHED_BYTES = 2**25  # bytes of the cached bit sets of words

_Sentence = tuple[str, ...]


def rouge_l(prediction: str, answer: str, max_steps: int) -> tuple[float, bool]:
    """Return the F value, and whether any trace takes more than `max_steps` steps.

    Raises ValueError for a text without a sentence, such as "" or ".".
    """
    predicted, wanted = _sentences(prediction), _sentences(answer)
    if not predicted or not wanted:
        raise ValueError("ROUGE-L needs a sentence in both texts.")
    table = _Table(predicted)
    common: set[str] = set().union(*(table.trace(sentence)[0] for sentence in wanted))
    recall, precision = (len(common) / len(set(chain.from_iterable(text))) for text in (wanted, predicted))
    f = 2.0 * ((precision * recall) / (precision + recall + 1e-8))
    return f, _any_longer(max_steps, predicted, wanted)


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence of two lists of words."""
    return _Table([tuple(first)]).common_length(tuple(second)) if first and second else 0


def _sentences(text: str) -> list[_Sentence]:
    """Return the distinct sentences; a repeated one does not change the score."""
    return list(dict.fromkeys(tuple(part.split()) or ("",) for part in text.split(".") if part))


def _any_longer(max_steps: int, predicted: Sequence[_Sentence], wanted: Sequence[_Sentence]) -> bool:
    return any(
        _Table([other]).trace(sentence)[1] > max_steps
        for sentence in wanted
        for other in predicted
        if len(sentence) + len(other) > max_steps  # no trace is longer than this sum
    )


class _Table:
    """The tables of one sentence (rows) against several (columns), and the traces through them.

    Bits: a border, then the words of each column sentence followed by another border. A trace that leaves its table on
    the left stops at that border. Memory is linear in the texts: the bits of a word are computed from its positions on
    demand, because bits for every distinct word would take quadratic memory.
    """

    def __init__(self, columns: Sequence[_Sentence]) -> None:
        self._positions: dict[str, list[int]] = {}  # per word
        borders, at = [0], 1
        for sentence in columns:
            for word in sentence:
                self._positions.setdefault(word, []).append(at)
                at += 1
            borders.append(at)
            at += 1
        self._nbytes = (at + 7) // 8
        border_bits = self._bits(borders)
        self._words = (1 << at) - 1 ^ border_bits
        self._words_mirrored, self._borders_mirrored = self._mirror(self._words), self._mirror(border_bits)
        self._max_cached = _CACHED_BYTES // self._nbytes
        self._cached: dict[str, int] = {}
        self._cached_mirrored: dict[str, int] = {}

    def trace(self, sentence: _Sentence) -> tuple[set[str], int]:
        """Return the words of diagonal steps, and the number of steps (for one column sentence)."""
        words, borders = self._words_mirrored, self._borders_mirrored
        traces = last = borders << 1 & words  # start at the last word of each sentence
        common: set[str] = set()
        rows = diagonal = 0
        for word, grows in self._rows_reversed(self._words, sentence):
            equal = self._matches_mirrored(word)
            stops = grows | equal | borders
            traces = (words & ~stops) + traces & stops  # the carry moves each trace left to its next stop
            if not traces & words:
                break
            rows += 1
            if found := traces & equal:
                common.add(word)
                diagonal += 1
                traces += found  # one column to the left
        columns = traces.bit_length() - last.bit_length()
        return common, rows + columns - diagonal

    def common_length(self, sentence: _Sentence) -> int:
        """Return the length of the longest common subsequence (for a single column sentence)."""
        return (self._words ^ self._last_row(self._words, sentence)).bit_count()

    def _rows_reversed(self, top: int, sentence: _Sentence) -> Iterator[tuple[str, int]]:
        """Yield the words in reverse, each with the mirrored bits where its row of T grows.

        `top`: the row above the first. Keeps _ROWS_KEPT rows, and _PARTS rows per recursion level, instead of all.
        """
        if len(sentence) <= _ROWS_KEPT:
            before, grows = self._words, 0
            for word, row in zip(reversed(sentence), reversed(list(self._rows(top, sentence))), strict=True):
                if row != before:
                    before, grows = row, self._mirror(self._words ^ row)
                yield word, grows
            return
        size = max(_ROWS_KEPT, -(-len(sentence) // _PARTS))
        parts = [sentence[at : at + size] for at in range(0, len(sentence), size)]
        tops = [top]
        for part in parts[:-1]:
            tops.append(self._last_row(tops[-1], part))
        for above, part in zip(reversed(tops), reversed(parts), strict=True):
            yield from self._rows_reversed(above, part)

    def _rows(self, top: int, sentence: _Sentence) -> Iterator[int]:
        """Yield the row of each word below the row `top`. Bits are set where T does not grow.

        Hyyro's recurrence (2004): the carry of a sum moves each match to the end of its run of columns without growth.
        """
        row = top
        for word in sentence:
            if match := row & self._matches(word):
                row = (row + match | row - match) & self._words
            yield row

    def _last_row(self, top: int, sentence: _Sentence) -> int:
        row = top
        for row in self._rows(top, sentence):  # noqa: B007 (only the last row is used)
            pass
        return row

    def _matches(self, word: str) -> int:
        """Return the bits of the columns with this word."""
        if word in self._cached:
            return self._cached[word]
        bits = self._bits(self._positions.get(word, ()))
        if len(self._cached) < self._max_cached:
            self._cached[word] = bits
        return bits

    def _matches_mirrored(self, word: str) -> int:
        if word in self._cached_mirrored:
            return self._cached_mirrored[word]
        bits = self._mirror(self._matches(word)) if word in self._positions else 0
        if len(self._cached_mirrored) < self._max_cached:
            self._cached_mirrored[word] = bits
        return bits

    def _bits(self, positions: Sequence[int]) -> int:
        if len(positions) < 4:
            return functools.reduce(operator.or_, (1 << position for position in positions), 0)
        content = bytearray(self._nbytes)
        for position in positions:
            content[position >> 3] |= 1 << (position & 7)
        return int.from_bytes(content, "little")

    def _mirror(self, bits: int) -> int:
        """Return the bits in reverse order: sums carry upwards, but traces move to lower columns."""
        return int.from_bytes(bits.to_bytes(self._nbytes, "little").translate(_MIRRORED), "big")
