"""From a row to token ids: fill the template, cut the middle, wrap as chat, fit the window."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from sparsecache.errors import UsageError, one_line
from sparsecache.longbench.tasks import Task

_END = 200  # characters; most templates end in the question
_WAY_OUT = "Give the checkpoint a table with another `chat` in configs/models.toml."


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    bos_token: str | None
    bos_token_id: int | None
    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool = ..., verbose: bool = ...) -> Any: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model gets it.

    original_tokens: tokens of the filled template, before any cut.
    truncated: whether anything was cut. recut_tokens: how many tokens had to go after wrapping (mostly 0).
    sha256: of the UTF-8 text that the token ids stand for. end: that text's last 200 characters.
    """

    token_ids: list[int]
    original_tokens: int
    truncated: bool
    recut_tokens: int
    sha256: str
    end: str


@dataclass(frozen=True)
class Prompter:
    """Makes prompts by LongBench's protocol for one tokenizer.

    window: tokens that prompt and new tokens together may take.
    max_length: tokens of the raw prompt above which its middle is cut; None stands for the window less the
        dataset's cap less the wrapper's tokens.
    chat: "template" (the tokenizer's own chat template), "none", or a wrapper text with {prompt} in it.
    """

    tokenizer: Tokenizer
    window: int
    max_length: int | None = None
    chat: str = "none"
    chat_template_args: tuple[tuple[str, Any], ...] = ()

    def build(self, task: Task, row: dict[str, Any]) -> Prompt:
        """The prompt of one row. Raises UsageError when the window leaves no room for a prompt."""
        text = task.template.format(**row)
        token_ids = self._tokenize(text)
        original_tokens = len(token_ids)
        cut = original_tokens > self.cut_length(task)
        if cut:
            half = int(self.cut_length(task) / 2)
            text = self._text(token_ids[:half]) + self._text(token_ids[original_tokens - half :])
            token_ids = self._tokenize(text)
        if task.chat and self.chat != "none":
            text = self._wrap(text)
            token_ids = self._tokenize(text)
        room = self._room(task)
        recut_tokens = max(0, len(token_ids) - room)
        if recut_tokens:
            token_ids = token_ids[: room - room // 2] + token_ids[len(token_ids) - room // 2 :]
            text = self.tokenizer.decode(token_ids, skip_special_tokens=False)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return Prompt(token_ids, original_tokens, cut or recut_tokens > 0, recut_tokens, digest, text[-_END:])

    def cut_length(self, task: Task) -> int:
        """Tokens of the raw prompt above which the middle is cut."""
        return self.room(task) if self.max_length is None else self.max_length

    def room(self, task: Task) -> int:
        """Tokens that the window leaves for the raw prompt. Raises UsageError if that is next to nothing."""
        return self._room(task, self._wrapper_tokens if task.chat and self.chat != "none" else 0)

    @cached_property
    def _wrapper_tokens(self) -> int:
        try:
            text = self._wrap("x")
            wrapped = self._tokenize(text)
        except Exception as error:  # whatever a broken template raises
            raise UsageError(f"The chat wrapper cannot be used ({one_line(error)}). {_WAY_OUT}") from error
        if "x" not in text:
            raise UsageError(f"The chat wrapper drops the prompt. {_WAY_OUT}")
        starts = sum(token_id == self.tokenizer.bos_token_id for token_id in wrapped)
        if starts > 1:
            raise UsageError(f"The chat wrapper makes {starts} BOS tokens; one is allowed. {_WAY_OUT}")
        return len(wrapped) - len(self._tokenize("x"))

    def _room(self, task: Task, wrapper: int = 0) -> int:
        room = self.window - task.max_new_tokens - wrapper
        if room < 2:
            raise UsageError(
                f"The window of {self.window} tokens leaves no room for a prompt beside the {task.max_new_tokens} "
                f"new tokens of {task.name} and the wrapper's {wrapper}. Raise --window, or use a checkpoint with a "
                f"longer one."
            )
        return room

    def _wrap(self, text: str) -> str:
        if self.chat != "template":
            return self.chat.replace("{prompt}", text)
        wrapped: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            **dict(self.chat_template_args),
        )
        return wrapped

    def _tokenize(self, text: str) -> list[int]:
        """Token ids with the tokenizer's special tokens; a BOS that the text brings along is not doubled."""
        bos = self.tokenizer.bos_token
        brings_bos = bool(bos) and text.startswith(str(bos))
        encoded = self.tokenizer(text, add_special_tokens=not brings_bos, verbose=False)
        token_ids: list[int] = list(encoded["input_ids"])
        if bos and token_ids[:2] == [self.tokenizer.bos_token_id] * 2:
            raise ValueError(f"The prompt begins with two {bos} tokens; it must begin with one at most.")
        return token_ids

    def _text(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)
