"""Decode new tokens to text. Keeps `<think>` and `</think>`."""

from functools import cached_property
from typing import Any

from sparsecache.longbench.reasoning import END, START


class Detokenizer:
    """Decodes token ids with a tokenizer of transformers."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of the tokens, without special tokens other than `<think>` and `</think>`."""
        parts: list[str] = []
        start = 0
        for at, token_id in enumerate(token_ids):
            if token_id in self._reasoning_marks:
                parts += [self._decode(token_ids[start:at]), self._reasoning_marks[token_id]]
                start = at + 1
        return "".join([*parts, self._decode(token_ids[start:])])

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    @cached_property
    def _reasoning_marks(self) -> dict[int, str]:
        """Return the ids of the marks of reasoning that are special tokens, which the tokenizer leaves out."""
        vocabulary = self._tokenizer.get_vocab()
        marks = {vocabulary[mark]: mark for mark in (START, END) if mark in vocabulary}
        return {token_id: mark for token_id, mark in marks.items() if not self._decode([token_id])}
