"""Summary-level ROUGE-L as the package `rouge` 1.0.1 has it: the same digits, by rows of bits instead of tables.

Published tables were made with https://github.com/pltrdy/rouge, so what is odd about it stays: sentences end at every
".", a blank one holds one empty word, and a word counts once, however often it stands in a text. For each sentence of
the answer and each of the prediction it fills the table T of longest common subsequences, T[i, j] for the first i
words of the one and the first j of the other, and walks back from its end, one call deeper with each step: diagonally
on equal words, else up (i - 1) where T is larger than to the left (j - 1). The words of all diagonal steps count.

Here a row of T is an integer with a bit for each j, set where T[i, j] exceeds T[i, j - 1]: on unequal words, that is
where a walk goes up. The sentences of the prediction lie side by side in it, and all their walks go at once.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_ROWS_KEPT = 512  # of a table; those before are made again when the walk gets there

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
    left stays on the border there.
    """

    def __init__(self, across: Sequence[_Sentence]) -> None:
        self._places: dict[str, int] = {}  # of each word
        borders, at = 1, 1
        for sentence in across:
            for word in sentence:
                self._places[word] = self._places.get(word, 0) | 1 << at
                at += 1
            borders |= 1 << at
            at += 1
        self._words = (1 << at) - 1 ^ borders
        self._nbytes = (at + 7) // 8
        self._places_mirrored = {word: self._mirror(places) for word, places in self._places.items()}
        self._words_mirrored, self._borders_mirrored = self._mirror(self._words), self._mirror(borders)

    def walk(self, down: _Sentence) -> tuple[set[str], int]:
        """The words of all diagonal steps; the number of steps, if there is but one sentence across."""
        words, borders = self._words_mirrored, self._borders_mirrored
        here = last = borders << 1 & words  # the last word of each sentence
        common: set[str] = set()
        rows = diagonal = 0
        for word, larger in self._rows_from_the_end(down):
            equal = self._places_mirrored.get(word, 0)
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

    def _rows_from_the_end(self, down: _Sentence) -> Iterator[tuple[str, int]]:
        """For each word down, from the last: the word, and mirrored, where its row of T grows."""
        parts = [down[at : at + _ROWS_KEPT] for at in range(0, len(down), _ROWS_KEPT)]
        tops = [self._words]
        for part in parts[:-1]:
            tops.append(self._rows(tops[-1], part)[-1])
        for top, part in zip(reversed(tops), reversed(parts), strict=True):
            before, larger = self._words, 0
            for word, row in zip(reversed(part), reversed(self._rows(top, part)), strict=True):
                if row != before:
                    before, larger = row, self._mirror(self._words ^ row)
                yield word, larger

    def _rows(self, top: int, down: _Sentence) -> list[int]:
        """The rows below `top`, one for each word down; set are the words where T does not grow.

        Hyyro's recurrence (2004): a sum carries each match on to the end of its run of columns without growth.
        """
        rows = []
        row = top
        for word in down:
            if match := row & self._places.get(word, 0):
                row = (row + match | row - match) & self._words
            rows.append(row)
        return rows

    def _mirror(self, bits: int) -> int:
        """The same bits from the other end: a sum carries to higher bits, and the walks go to lower columns."""
        return int.from_bytes(bits.to_bytes(self._nbytes, "little").translate(_MIRRORED), "big")
