"""Wraps a raw prompt as one user turn, with a chat template or a text that holds {prompt}.

Templates come from checkpoints and are not trusted: they may drop or change the prompt, or never finish.
"""

import ctypes
import hashlib
import json
import queue
import string
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Protocol

from sparsecache.errors import UsageError, one_line

CLOCK = datetime(2024, 7, 26)
"""The fixed time for chat templates (`date_string` in models.toml), so that prompts do not change from day to day."""
PROMPT = "{prompt}"
_MAX_WRAPPER = 1_000_000  # characters around a prompt; a template may render any number
_RENDER_S = 10.0  # sound templates render a million characters in well under a second
_WORD = "kVq3wXz9JtYbR5mLhD8sPfG2nCuEa4Tg"
_PROBE = "\n".join(
    f"{at} {_WORD}  'two' \"spaces\", {{braces}} <tags> & 漢字É\t[{_WORD[::-1]}]\n\n" for at in range(50)
).strip()
_HINT = "Choose another --chat, or give the checkpoint a table with another `chat` in configs/models.toml."


class Tokenizer(Protocol):
    """The part of transformers' tokenizer interface that prompts need."""

    bos_token: str | None
    bos_token_id: int | None
    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool = ..., verbose: bool = ...) -> Any: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...

    def get_chat_template(self) -> str: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text with special tokens.

    A BOS token at the start of the text is not doubled.

    Raises ValueError if the ids still begin with two BOS tokens.
    """
    token_ids: list[int] = list(tokenizer(text, verbose=False)["input_ids"])
    if tokenizer.bos_token and text.startswith(str(tokenizer.bos_token)) and _doubled(tokenizer, token_ids):
        del token_ids[0]
    return _checked(tokenizer, token_ids)


def _doubled(tokenizer: Tokenizer, token_ids: list[int]) -> bool:
    return tokenizer.bos_token_id is not None and token_ids[:2] == [tokenizer.bos_token_id] * 2


def _checked(tokenizer: Tokenizer, token_ids: list[int]) -> list[int]:
    if _doubled(tokenizer, token_ids):
        raise ValueError(f"The prompt begins with two {tokenizer.bos_token} tokens; it must begin with at most one.")
    return token_ids


@dataclass(frozen=True)
class Wrapper:
    """The chat wrapper of one run.

    chat: "template" (the tokenizer's chat template), "none", or a text that holds {prompt}.
    arguments: variables of the template.
    """

    tokenizer: Tokenizer
    chat: str = "none"
    arguments: tuple[tuple[str, Any], ...] = ()

    def wrap(self, text: str) -> str:
        """Return the wrapped text. Raises ValueError if the template changes the text."""
        wrapped = self._wrap(text, self.content_is_list)
        if text.strip() not in wrapped:
            raise ValueError("The chat template changes the text of this prompt.")
        return wrapped

    def encode(self, wrapped: str) -> list[int]:
        """Return the ids of a wrapped text.

        Special tokens are added unless a chat template was rendered, which already contains them.
        """
        if self.chat != "template":
            return encode(self.tokenizer, wrapped)
        token_ids = self.tokenizer(wrapped, add_special_tokens=False, verbose=False)["input_ids"]
        return _checked(self.tokenizer, list(token_ids))

    @cached_property
    def text(self) -> str:
        """The wrapper with {prompt} in place of the prompt. Raises UsageError as `tokens` does."""
        return self._probed[0]

    @cached_property
    def content_is_list(self) -> bool:
        """Whether the template accepts the content of a turn only as a list of parts."""
        return self._probed[1]

    @cached_property
    def tokens(self) -> int:
        """The number of tokens that the wrapper adds to a prompt.

        Raises UsageError for a wrapper that fails, that drops, repeats or changes the prompt, or doubles the BOS token.
        """
        wrapped = self._wrap("x", self.content_is_list)
        return len(self.encode(wrapped)) - len(encode(self.tokenizer, "x"))

    @cached_property
    def _probed(self) -> tuple[str, bool]:
        if self.chat == "none":
            return PROMPT, False
        if self.chat != "template" and self.chat.count(PROMPT) != 1:
            raise UsageError(
                f"The chat wrapper {self.chat!r} drops or repeats the prompt: it must hold {PROMPT} once. {_HINT}"
            )
        templates = self.tokenizer.chat_template
        if self.chat == "template" and isinstance(templates, dict) and "default" not in templates:
            raise UsageError(
                f"The tokenizer has several chat templates ({', '.join(map(str, templates))}), none of them named "
                f"default. {_HINT}"
            )
        try:
            wrapped, is_list = self._probe_contents()
            self.encode(wrapped)
            varies = self._wrap(_PROBE, is_list) != wrapped
        except Exception as error:  # whatever a broken template raises
            raise UsageError(f"The chat wrapper cannot be used ({one_line(error)}). {_HINT}") from error
        if varies:
            raise UsageError(f"The chat template renders a different text each time. {_HINT}")
        if wrapped.count(_PROBE) != 1:
            raise UsageError(f"The chat template {_describe_damage(wrapped)} the prompt. {_HINT}")
        text = wrapped.replace(_PROBE, PROMPT)
        missing = [token for token in getattr(self.tokenizer, "missing_tokens", ()) if token in text]
        if missing:
            raise UsageError(
                f"The chat wrapper holds {', '.join(missing)}, which is one token in the checkpoint's other tokenizer "
                f"files but not in tokenizer.json. Download or save the tokenizer again."
            )
        return text, is_list

    def _probe_contents(self) -> tuple[str, bool]:
        """Render the probe as text, or as a list of parts if the template drops the text."""
        try:
            wrapped = self._wrap(_PROBE, False)
            if self.chat != "template" or _WORD.lower() in wrapped.lower():
                return wrapped, False
        except TimeoutError:
            raise
        except Exception as error:
            try:
                return self._wrap(_PROBE, True), True
            except Exception:
                raise error from None
        as_list = self._wrap(_PROBE, True)
        return (as_list, True) if _PROBE in as_list else (wrapped, False)

    def _wrap(self, text: str, content_is_list: bool) -> str:
        if self.chat != "template":
            return self.chat.replace(PROMPT, text) if self.chat != "none" else text
        content: Any = [{"type": "text", "text": text}] if content_is_list else text
        rendered = _run_with_timeout(
            lambda: self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=_PINNED_CLOCK + self.tokenizer.get_chat_template(),
                tokenize=False,
                add_generation_prompt=True,
                **dict(self.arguments),
            )
        )
        if len(rendered) > len(text) + _MAX_WRAPPER:
            raise ValueError(f"it adds {len(rendered) - len(text):,} characters to a prompt")
        return rendered

    def probe_sha256(self) -> str:
        """Return the SHA-256 of the token ids of a fixed text, raw and wrapped.

        It identifies the tokenization.

        Raises UsageError as `tokens` does, and for a tokenizer that cannot encode the text.
        """
        wrapped = self.text.replace(PROMPT, _PROBE)
        try:
            return ids_sha256([*encode(self.tokenizer, _PROBE), *self.encode(wrapped)])
        except Exception as error:  # whatever a tokenizer raises
            raise UsageError(f"The checkpoint's tokenizer cannot be used: {one_line(error)}") from error


def ids_sha256(token_ids: list[int]) -> str:
    """Return the SHA-256 of token ids, written in decimal and separated by commas."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()


def _describe_damage(wrapped: str) -> str:
    if _WORD.lower() not in wrapped.lower():
        return "drops"
    return "repeats" if _PROBE in wrapped else "changes or cuts"


def _clock_macro() -> str:
    """Return a macro that replaces transformers' `strftime_now`, whose clock cannot be set.

    It ends in the newline that Jinja drops after a block, so that the template starts on a new line.
    """
    names = [f"%{flag}{letter}" for flag in ("-", "") for letter in string.ascii_letters if letter != "s"]
    pinned = [("%%", "\0"), *((name, CLOCK.strftime(name)) for name in names), ("\0", "%")]
    # A loop: a chain of a hundred filters takes Jinja most of a second to compile, per template.
    replace = "{% set pinned.text = pinned.text | replace(name, value) %}"
    loop = "{% for name, value in " + json.dumps(pinned) + " %}" + replace + "{% endfor %}"
    start = "{% macro strftime_now(format) %}{% set pinned = namespace(text=format) %}"
    return start + loop + "{{ pinned.text }}{% endmacro %}\n"


_PINNED_CLOCK = _clock_macro()


def _run_with_timeout(render: Callable[[], str]) -> str:
    """Return the result of `render`. Raises TimeoutError after _RENDER_S seconds of computing, busy machine or not."""
    clocks: queue.SimpleQueue[int] = queue.SimpleQueue()
    outcome: list[str | BaseException] = []

    def work() -> None:
        clocks.put(time.pthread_getcpuclockid(threading.get_ident()))
        try:
            outcome.append(render())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    clock = clocks.get()
    while thread.is_alive() and _cpu_seconds(clock) < _RENDER_S:
        thread.join(0.1)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise TimeoutError(f"the chat template takes longer than {_RENDER_S:.0f} s to render")
    result = outcome[0]
    if isinstance(result, BaseException):
        raise result
    return result


def _cpu_seconds(clock: int) -> float:
    """Return the seconds that a thread has computed; 0 if it has ended."""
    try:
        return time.clock_gettime(clock)
    except OSError:
        return 0.0
