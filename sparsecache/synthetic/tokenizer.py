"""A byte-level BPE tokenizer trained on synthetic text.

Used by the bundled checkpoint and by checkpoints with random weights.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# One word per match: letters with the space or underscore before them, three quotes, any other single character,
# line ends, spaces. Python's `re` and the `tokenizers` library read this pattern alike.
PATTERN = r'[ _]?[A-Za-z]+| ?"{3}| ?[^A-Za-z \r\n]|[\r\n]+| +'
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SPECIAL_TOKENS = (BOS, EOS, PAD)  # ids 0, 1, 2


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Train a byte-level BPE of `vocab_size` entries on `texts`.

    Decoding restores any text exactly. The tokenizer adds one `<s>` before a text.
    """
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
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    return tokenizer
