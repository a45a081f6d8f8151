"""Makes a prompt from a row: fills the template, truncates the middle, wraps it, appends the answer prefix."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sparsecache.errors import UsageError
from sparsecache.longbench.tasks import Task
from sparsecache.longbench.wrapping import Tokenizer, Wrapper, encode, ids_sha256

_END_CHARS = 200  # most templates end in the question


@dataclass(frozen=True)
class Prompt:
    """The prompt of one row.

    original_tokens: tokens of the filled template, before truncation.
    truncated: whether tokens were removed. overflow_tokens: tokens removed after wrapping (usually 0).
    sha256: of the prompt's UTF-8 text. end: the last 200 characters of that text.
    ids_sha256: of the token ids (`wrapping.ids_sha256`).
    """

    token_ids: list[int]
    original_tokens: int
    truncated: bool
    overflow_tokens: int
    sha256: str
    end: str
    ids_sha256: str


@dataclass(frozen=True)
class Prompter:
    """Makes prompts for one tokenizer, following LongBench's protocol.

    window: maximum number of prompt and new tokens together.
    max_length: tokens above which the middle of a raw prompt is truncated. None: the window less the dataset's new
        tokens and the wrapper's tokens.
    chat, chat_template_args: the wrapper (`wrapping.Wrapper`).
    """

    tokenizer: Tokenizer
    window: int
    max_length: int | None = None
    chat: str = "none"
    chat_template_args: tuple[tuple[str, Any], ...] = ()

    @cached_property
    def wrapper(self) -> Wrapper:
        """The wrapper, for datasets whose prompts are wrapped."""
        return Wrapper(self.tokenizer, self.chat, self.chat_template_args)

    def build(self, task: Task, row: dict[str, Any]) -> Prompt:
        """Return the prompt of one row. Raises UsageError if the window is too small for any prompt."""
        return self._build(task, task.template.format(**row), task.answer_prefix.format(**row))

    def build_answer(self, task: Task, row: dict[str, Any], reasoning: str) -> Prompt:
        """Return the prompt of the second step of a row, with the text of the first one. Raises as `build`."""
        reasoning = reasoning.strip()
        if task.benchmark == "longbench_v2":  # the official code also replaces this placeholder in a row's texts
            row = {
                key: text.replace("$COT$", reasoning) if isinstance(text, str) else text for key, text in row.items()
            }
        assert task.answer_max_new_tokens is not None
        text = task.answer_template.format(**row, reasoning=reasoning)
        return self._build(replace(task, max_new_tokens=task.answer_max_new_tokens), text, "")

    def _build(self, task: Task, text: str, prefix: str) -> Prompt:
        """Return the prompt of a filled template. The task gives its new tokens, and how it is wrapped and cut."""
        token_ids = encode(self.tokenizer, text)
        original_tokens = len(token_ids)
        limit = self.cut_length(task)
        if prefix and self.max_length is None:
            limit -= len(encode(self.tokenizer, prefix))
        cut = original_tokens > limit
        if cut:
            text = self._joined(task, token_ids, limit)
            token_ids = encode(self.tokenizer, text)
        if prefix or self._wraps(task):
            text, token_ids = self._complete(task, text, prefix)
        room = self._capacity(task)
        overflow_tokens = max(0, len(token_ids) - room)
        if overflow_tokens:
            token_ids = token_ids[: room - room // 2] + token_ids[len(token_ids) - room // 2 :]
            text = self.tokenizer.decode(token_ids, skip_special_tokens=False)
        return Prompt(
            token_ids=token_ids,
            original_tokens=original_tokens,
            truncated=cut or overflow_tokens > 0,
            overflow_tokens=overflow_tokens,
            sha256=hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
            end=text[-_END_CHARS:],
            ids_sha256=ids_sha256(token_ids),
        )

    def num_tokens(self, task: Task, row: dict[str, Any]) -> int:
        """Return the tokens of the whole prompt of a row, wrapper and answer prefix included, without any cut."""
        text, prefix = task.template.format(**row), task.answer_prefix.format(**row)
        return len(self._complete(task, text, prefix)[1])

    def _complete(self, task: Task, text: str, prefix: str) -> tuple[str, list[int]]:
        """Return the wrapped text with the answer prefix behind it, and its token ids."""
        if not self._wraps(task):
            return text + prefix, encode(self.tokenizer, text + prefix)
        text = self.wrapper.wrap(text) + prefix
        return text, self.wrapper.encode(text)

    def _joined(self, task: Task, token_ids: list[int], limit: int) -> str:
        """Return the text of the first and last tokens of a prompt that is too long."""
        half = int(limit / 2)
        first, rest = token_ids[:half], len(token_ids) - half
        if task.join_halves:  # the last half has one token more of an odd length
            return self._text(first + token_ids[len(token_ids) - (limit - half) :])
        return self._text(first) + self._text(token_ids[rest:])

    def cut_length(self, task: Task) -> int:
        """Return the tokens above which the middle of a raw prompt is truncated."""
        return self.capacity(task) if self.max_length is None or task.length else self.max_length

    def capacity(self, task: Task) -> int:
        """Return the tokens that the window leaves for the raw prompt.

        Raises UsageError if there are fewer than two, and if the wrapper is unusable (`Wrapper.tokens`).
        """
        return self._capacity(task, self.wrapper.tokens if self._wraps(task) else 0)

    def _wraps(self, task: Task) -> bool:
        return task.chat and self.chat != "none"

    def _capacity(self, task: Task, wrapper: int = 0) -> int:
        room = self.window - task.max_new_tokens - wrapper
        if room < 2:
            raise UsageError(
                f"The window of {self.window} tokens is too small for a prompt: {task.name} needs "
                f"{task.max_new_tokens} new tokens and the wrapper {wrapper}. Raise --window, or use a checkpoint "
                f"with a longer context."
            )
        return room

    def _text(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)
