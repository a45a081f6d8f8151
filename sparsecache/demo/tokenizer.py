"""The trained checkpoint's tokenizer: a byte-level BPE over the words of the lessons, and a fast encoder for it."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecache.demo.build import estimate_tokens
from sparsecache.demo.lessons import MIX, lesson

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# A word with the blank or underscore before it, three quotes, any other character, line ends, blanks. Python's
# `re` and the tokenizer's regular expressions read this alike.
PATTERN = r'[ _]?[A-Za-z]+| ?"{3}| ?[^A-Za-z \r\n]|[\r\n]+| +'
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SPECIAL = (BOS, EOS, PAD)  # ids 0, 1, 2
_LESSONS = 60  # of each dataset
_WIDE_WEIGHT = 10
_split = re.compile(PATTERN).findall


def train_tokenizer(vocabulary: int = 4096) -> "Tokenizer":
    """A tokenizer of the given size, trained on lessons of every dataset; the same every time."""
    return build_tokenizer(_lesson_words(), vocabulary)


def build_tokenizer(texts: Iterable[str], vocabulary: int) -> "Tokenizer":
    """A byte-level BPE trained on the texts: any text survives it, and one `<s>` goes before."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    return tokenizer


def _lesson_words() -> Iterator[str]:
    """The words of many lessons, each once for a lesson, so that no name gets a token for one text that repeats it.

    A Chinese character counts for more, so that it gets a token before parts of names do.
    """
    for dataset in MIX:
        for number in range(_LESSONS):
            words: set[str] = set()

            def hear(text: str, words: set[str] = words) -> list[int]:
                words.update(_split(text))
                return [0] * round(estimate_tokens(text))

            lesson(dataset, 1024, f"tokenizer/{number}", hear)
            for word in sorted(words):
                yield from [word] * (1 if word.isascii() else _WIDE_WEIGHT)


class Encoder:
    """Encodes as the tokenizer does, without its `<s>`, but remembers the ids of every word."""

    def __init__(self, tokenizer: "Tokenizer | Path") -> None:
        """`tokenizer` is one of this module, or the path of its `tokenizer.json`."""
        if isinstance(tokenizer, Path):
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(tokenizer))
        self._words = _Words(tokenizer)

    def __call__(self, text: str) -> list[int]:
        words = self._words
        return [token for word in _split(text) for token in words[word]]


class _Words(dict[str, list[int]]):
    """Ids by word; a word that is missing is encoded."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(word, add_special_tokens=False).ids
        if len(self) < 200_000:
            self[word] = ids
        return ids
