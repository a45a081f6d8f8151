"""A tokenizer whose token ids come from the library of its file, and all else from transformers."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from transformers import BatchEncoding

if TYPE_CHECKING:
    from sparsecache.engine.sentencepiece_model import SentencePieceEncoder

_PROBE_TEXTS = (
    "Question: which of the towns has a mill? Don't say I'LL, they'd ask.",
    "  two  spaces,   three\n\n\nand lines\t\tand tabs \r\n ",
    " 1 22 333 4444 55555 1,234.50 17:45 12% 2024-07-26",
    "def add(first, second):\n    total = first + second  # sum\n    return {'a': [total]}\n",
    "请根据下面的文章回答问题。河边的小镇有一座桥，１２３。 Привет, où été naïve ﬁn e\u0301",
    "🙂👩‍👧 <b>x</b> https://a.bc/d?e=f&g getValue JSONDecodeError camelCase NaOH",
)


def mistral_regex_fixed(hf_tokenizer: Any) -> bool | None:
    """Return whether transformers uses the correct regex; None if it does not detect the incorrect one in the file."""
    fixed: bool | None = getattr(getattr(hf_tokenizer, "backend_tokenizer", None), "fix_mistral_regex", None)
    return fixed


class Tokenizer:
    """Encodes and decodes as the library of its file, with the chat template and special tokens of transformers.

    Its methods have the names and arguments of a transformers tokenizer.
    """

    def __init__(self, path: Path, encoder: "tokenizers.Tokenizer | SentencePieceEncoder", hf_tokenizer: Any):
        """path, encoder: the tokenizer's file, and its library's reading of it.

        hf_tokenizer: transformers' tokenizer of its folder.
        """
        self._path, self._encoder, self._hf_tokenizer = path, encoder, hf_tokenizer
        self.bos_token: str | None = hf_tokenizer.bos_token
        self.bos_token_id = self._id_of(hf_tokenizer.bos_token)
        self.eos_token_id = self._id_of(hf_tokenizer.eos_token)
        self.chat_template: Any = hf_tokenizer.chat_template
        # transformers also lists the symbols that a sentencepiece model defines, which are text.
        ordinary = {at for at, token in hf_tokenizer.added_tokens_decoder.items() if not token.special}
        named = {hf_tokenizer.bos_token_id, hf_tokenizer.eos_token_id, hf_tokenizer.pad_token_id}
        self._special_ids = {*hf_tokenizer.all_special_ids} - (ordinary - named)

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._encoder.token_to_id(token)

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> BatchEncoding:
        """Return the ids as `input_ids`; `verbose` is ignored."""
        return BatchEncoding({"input_ids": self.encode(text, add_special_tokens=add_special_tokens)})

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text."""
        ids: list[int] = self._encoder.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids. The file and transformers both name special tokens."""
        if skip_special_tokens:
            token_ids = [token_id for token_id in token_ids if token_id not in self._special_ids]
        text: str = self._encoder.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of all tokens, with added ones."""
        vocabulary: dict[str, int] = self._encoder.get_vocab(with_added_tokens=True)
        return vocabulary

    def convert_ids_to_tokens(self, token_ids: list[int]) -> list[str | None]:
        """Return the token of each id; None for an unknown id."""
        return [self._encoder.id_to_token(token_id) for token_id in token_ids]

    def get_chat_template(self) -> str:
        """Return the chat template, the default of several. Raises ValueError if there is none."""
        template: str = self._hf_tokenizer.get_chat_template()
        return template

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Render a conversation to text, or to token ids with `tokenize=True`."""
        tokenize = options.pop("tokenize", True)
        text = self._hf_tokenizer.apply_chat_template(conversation, tokenize=False, **options)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    @cached_property
    def missing_tokens(self) -> list[str]:
        """Return tokens that tokenizer_config.json or its class adds and the tokenizer's file does not know."""
        added: dict[str, int] = self._hf_tokenizer.added_tokens_encoder
        return [token for token, at in added.items() if at not in self.encode(token, add_special_tokens=False)]

    @cached_property
    def notes(self) -> list[str]:
        """Return warnings for the user about tokenization."""
        notes = []
        if any(self._hf_ids(text) != self.encode(text, add_special_tokens=False) for text in _PROBE_TEXTS):
            label = type(self._hf_tokenizer).__name__
            notes.append(
                f"transformers' {label} tokenizes some texts differently from {self._path}. "
                f"Prompts get the ids of {self._path.name}."
            )
        if mistral_regex_fixed(self._hf_tokenizer) is False:
            notes.append(
                f"transformers detects in {self._path} the incorrect regex that some Mistral checkpoints ship. "
                f"Prompts get the ids of tokenizer.json as it is. To use the correct regex, add "
                f'"fix_mistral_regex": true to tokenizer_config.json.'
            )
        if self.encode("x")[-1:] == [self.eos_token_id]:
            notes.append(
                f"{self._path} ends every text with the end-of-text token, also a prompt that is not wrapped as chat."
            )
        return notes

    def _hf_ids(self, text: str) -> list[int] | None:
        """Return the token ids by transformers; None if it cannot encode the text."""
        try:
            return list(self._hf_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        except Exception:  # what a wrong field of tokenizer_config.json leads to
            return None
