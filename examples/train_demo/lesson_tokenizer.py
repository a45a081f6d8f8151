"""The tokenizer of the demo checkpoint, trained on lessons, and a cached encoder that is faster on lessons."""

import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from lessons import MIX, lesson
from sparsecache.synthetic.draft import estimate_tokens
from sparsecache.synthetic.tokenizer import PATTERN, build_tokenizer

LESSONS_PER_DATASET = 60
NON_ASCII_WEIGHT = 10
MAX_CACHED_WORDS = 200_000
_split = re.compile(PATTERN).findall


def train_tokenizer(vocab_size: int = 4096) -> Tokenizer:
    """Train a tokenizer of `vocab_size` entries on lessons of every dataset. The result is deterministic."""
    return build_tokenizer(_lesson_words(), vocab_size)


def _lesson_words() -> Iterator[str]:
    """Yield the words of the training lessons, each word once per lesson.

    Counting a word once per lesson keeps a name that one text repeats from becoming a token. Non-ASCII words
    (Chinese characters) are repeated, so that each becomes a token before parts of names do.
    """
    for dataset in MIX:
        for number in range(LESSONS_PER_DATASET):
            words: set[str] = set()

            def collect(text: str, words: set[str] = words) -> list[int]:
                words.update(_split(text))
                return [0] * round(estimate_tokens(text))

            lesson(dataset, 1024, f"tokenizer/{number}", collect)
            for word in sorted(words):
                yield from [word] * (1 if word.isascii() else NON_ASCII_WEIGHT)


class Encoder:
    """Encodes text to the tokenizer's ids without `<s>`, and caches the ids of every word."""

    def __init__(self, tokenizer: Tokenizer | Path) -> None:
        """`tokenizer` comes from `train_tokenizer`, or is the path of its `tokenizer.json`."""
        self._words = _WordCache(Tokenizer.from_file(str(tokenizer)) if isinstance(tokenizer, Path) else tokenizer)

    def __call__(self, text: str) -> list[int]:
        words = self._words
        return [token for word in _split(text) for token in words[word]]


class _WordCache(dict[str, list[int]]):
    """Token ids by word; a missing word is encoded and stored."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(word, add_special_tokens=False).ids
        if len(self) < MAX_CACHED_WORDS:
            self[word] = ids
        return ids
