"""From a row to token ids: fill the template, cut the middle, wrap as chat, fit the window."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sparsecache.errors import UsageError
from sparsecache.longbench.tasks import Task
from sparsecache.longbench.wrapping import Tokenizer, Wrapper, encode, ids_sha256

_END = 200  # characters; most templates end in the question


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model gets it.

    original_tokens: tokens of the filled template, before any cut.
    truncated: whether anything was cut. overflow_tokens: how many tokens were cut after wrapping (mostly 0).
    sha256: of the UTF-8 text that the token ids stand for. end: that text's last 200 characters.
    ids_sha256: of the token ids (wrapping.ids_sha256).
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
    """Makes prompts by LongBench's protocol for one tokenizer.

    window: tokens that prompt and new tokens together may take.
    max_length: tokens of the raw prompt above which its middle is cut; None stands for the window less the
        dataset's cap less the wrapper's tokens.
    chat, chat_template_args: the wrapper (wrapping.Wrapper).
    """

    tokenizer: Tokenizer
    window: int
    max_length: int | None = None
    chat: str = "none"
    chat_template_args: tuple[tuple[str, Any], ...] = ()

    @cached_property
    def wrapper(self) -> Wrapper:
        """The wrapper of prompts of the datasets that are wrapped."""
        return Wrapper(self.tokenizer, self.chat, self.chat_template_args)

    def build(self, task: Task, row: dict[str, Any]) -> Prompt:
        """Makes the prompt of one row. Raises UsageError when the window leaves no room for a prompt."""
        text = task.template.format(**row)
        token_ids = encode(self.tokenizer, text)
        original_tokens = len(token_ids)
        cut = original_tokens > self.cut_length(task)
        if cut:
            half = int(self.cut_length(task) / 2)
            text = self._text(token_ids[:half]) + self._text(token_ids[original_tokens - half :])
            token_ids = encode(self.tokenizer, text)
        if self._wraps(task):
            text = self.wrapper.wrap(text)
            token_ids = self.wrapper.encode(text)
        room = self._room(task)
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
            end=text[-_END:],
            ids_sha256=ids_sha256(token_ids),
        )

    def cut_length(self, task: Task) -> int:
        """Tokens of the raw prompt above which the middle is cut."""
        return self.room(task) if self.max_length is None else self.max_length

    def room(self, task: Task) -> int:
        """Tokens that the window leaves for the raw prompt.

        Raises UsageError if that is less than two, or if the wrapper cannot be used (Wrapper.tokens).
        """
        return self._room(task, self.wrapper.tokens if self._wraps(task) else 0)

    def _wraps(self, task: Task) -> bool:
        return task.chat and self.chat != "none"

    def _room(self, task: Task, wrapper: int = 0) -> int:
        room = self.window - task.max_new_tokens - wrapper
        if room < 2:
            raise UsageError(
                f"The window of {self.window} tokens leaves no room for a prompt beside the {task.max_new_tokens} "
                f"new tokens of {task.name} and the wrapper's {wrapper}. Raise --window, or use a checkpoint with a "
                f"longer one."
            )
        return room

    def _text(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)
