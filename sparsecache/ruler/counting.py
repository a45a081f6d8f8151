"""Words to count: the ten common words of a list, and the most frequent coded words of a text."""

import math
import string

from sparsecache.longbench.tasks import Task
from sparsecache.ruler.draft import Draft, letters, numbered, sample
from sparsecache.ruler.words import all_words
from sparsecache.synthetic.draft import Rng

_COMMON = 10
_SHORT = 4096  # below this length, words repeat less often
_ALPHA = 2.0
_ZETA = math.pi**2 / 6  # zeta(_ALPHA)
_TOKENS_PER_CODED_WORD = 50


class CommonWords:
    """The task `cwe`: ten words of a list are repeated more often than the others."""

    def __init__(self, task: Task):
        self._task = task
        self._short = (task.length or 0) < _SHORT

    @property
    def max_size(self) -> int:
        """The largest `size`: each word is used once."""
        return len(all_words())

    def make(self, rng: Rng, size: int) -> Draft:
        """Return a row of `size` different words, after a solved example."""
        few, many = (1, 6) if self._short else (3, 30)
        context, common = _word_list(rng, size, many, few)
        shown, answers = _word_list(rng, 20, 3, 1) if self._short else _word_list(rng, 40, 10, 3)
        row = {"context": shown, "input": "", "examples": ""}
        example = (self._task.template + self._task.answer_prefix).format(**row)
        return Draft(context, "", common, f"{example} {numbered(answers)}\n")


def _word_list(rng: Rng, size: int, common: int, uncommon: int) -> tuple[str, list[str]]:
    """Return a numbered list of `size` words, repeated `common` or `uncommon` times, and the common ones."""
    chosen = sample(rng, all_words(), size)
    words = chosen[:_COMMON] * common + chosen[_COMMON:] * uncommon
    return numbered(sample(rng, words)), chosen[:_COMMON]


class FrequentWords:
    """The task `fwe`: coded words whose frequencies follow a zeta distribution. The most frequent one is `...`."""

    def __init__(self, task: Task):
        assert task.length is not None
        self._vocabulary = max(4, (task.length - task.max_new_tokens) // _TOKENS_PER_CODED_WORD)

    def make(self, rng: Rng, size: int) -> Draft:
        """Return a row of about `size` words."""
        used: set[str] = set()
        coded = [rng.unique(lambda rng: letters(rng, string.ascii_lowercase, 6), used) for _ in range(self._vocabulary)]
        coded[0] = "..."
        counts = [int(size * rank**-_ALPHA / _ZETA) for rank in range(1, len(coded) + 1)]
        words = [word for word, count in zip(coded, counts, strict=True) for _ in range(count)]
        return Draft(" ".join(sample(rng, words)), "", coded[1:4])
