"""Wraps a raw prompt as one user turn: by the tokenizer's chat template, or by a text with {prompt} in it.

Templates come with checkpoints and are not trusted: they may drop the prompt, change it, or never end.
"""

import ctypes
import hashlib
import json
import string
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Protocol

from sparsecache.errors import UsageError, one_line

CLOCK = datetime(2024, 7, 26)
"""The time that every chat template sees, the date of models.toml's `date_string`: prompts must not change by day."""
PROMPT = "{prompt}"
_RENDER_S = 10.0  # of a prompt of a million characters, sound templates take well under a second
_WORD = "kVq3wXz9JtYbR5mLhD8sPfG2nCuEa4Tg"
_PROBE = "\n".join(
    f"{at} {_WORD}  'two' \"spaces\", {{braces}} <tags> & 漢字É\t[{_WORD[::-1]}]\n\n" for at in range(50)
).strip()
_HINT = "Choose another --chat, or give the checkpoint a table with another `chat` in configs/models.toml."


class Tokenizer(Protocol):
    """What is used of a tokenizer, with the names of transformers."""

    bos_token: str | None
    bos_token_id: int | None
    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool = ..., verbose: bool = ...) -> Any: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...

    def get_chat_template(self) -> str: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a text with the tokenizer's special tokens; a BOS that begins the text is not doubled.

    Raises ValueError if two BOS tokens begin it all the same.
    """
    token_ids: list[int] = list(tokenizer(text, verbose=False)["input_ids"])
    if tokenizer.bos_token and text.startswith(str(tokenizer.bos_token)) and _doubled(tokenizer, token_ids):
        del token_ids[0]
    return _checked(tokenizer, token_ids)


def _doubled(tokenizer: Tokenizer, token_ids: list[int]) -> bool:
    return tokenizer.bos_token_id is not None and token_ids[:2] == [tokenizer.bos_token_id] * 2


def _checked(tokenizer: Tokenizer, token_ids: list[int]) -> list[int]:
    if _doubled(tokenizer, token_ids):
        raise ValueError(f"The prompt begins with two {tokenizer.bos_token} tokens; it must begin with one at most.")
    return token_ids


@dataclass(frozen=True)
class Wrapper:
    """The wrapping of one run.

    chat: "template" (the tokenizer's chat template), "none", or a text with {prompt} in it.
    arguments: variables handed to the template.
    """

    tokenizer: Tokenizer
    chat: str = "none"
    arguments: tuple[tuple[str, Any], ...] = ()

    def wrap(self, text: str) -> str:
        """Returns the wrapped text. Raises ValueError if the template does not keep the text whole."""
        wrapped = self._wrap(text, self.content_is_list)
        if text.strip() not in wrapped:
            raise ValueError("The chat template does not keep the text of this prompt whole.")
        return wrapped

    def encode(self, wrapped: str) -> list[int]:
        """Returns the ids of a wrapped text.

        A rendered template brings its special tokens along, so none are added; to a hand-made wrapper they are.
        """
        if self.chat != "template":
            return encode(self.tokenizer, wrapped)
        token_ids = self.tokenizer(wrapped, add_special_tokens=False, verbose=False)["input_ids"]
        return _checked(self.tokenizer, list(token_ids))

    @cached_property
    def text(self) -> str:
        """What stands around a prompt, with {prompt} in the prompt's place. Raises UsageError as `tokens` does."""
        return self._probed[0]

    @cached_property
    def content_is_list(self) -> bool:
        """Whether the template renders a turn's content only as a list of parts, not as a text."""
        return self._probed[1]

    @cached_property
    def tokens(self) -> int:
        """How many tokens the wrapper adds to a prompt.

        Raises UsageError for a wrapper that fails, drops, repeats or changes the prompt, or doubles the BOS token.
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
                f"The tokenizer has several chat templates ({', '.join(map(str, templates))}), and none is called "
                f"default. {_HINT}"
            )
        try:
            wrapped, is_list = self._probe_contents()
            self.encode(wrapped)
            changing = self._wrap(_PROBE, is_list) != wrapped
        except Exception as error:  # whatever a broken template raises
            raise UsageError(f"The chat wrapper cannot be used ({one_line(error)}). {_HINT}") from error
        if changing:
            raise UsageError(f"The chat template renders another text each time. {_HINT}")
        if wrapped.count(_PROBE) != 1:
            raise UsageError(f"The chat template {_damage(wrapped)} the prompt. {_HINT}")
        text = wrapped.replace(_PROBE, PROMPT)
        missing = [token for token in getattr(self.tokenizer, "missing_tokens", ()) if token in text]
        if missing:
            raise UsageError(
                f"The chat wrapper holds {', '.join(missing)}, which tokenizer.json does not know as one token, though "
                f"the checkpoint's other tokenizer files do. Fetch or save the tokenizer again."
            )
        return text, is_list

    def _probe_contents(self) -> tuple[str, bool]:
        """Renders the probe as text, and as a list of parts where that gives nothing of it."""
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
        return _bounded(
            lambda: self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=_PINNED_CLOCK + self.tokenizer.get_chat_template(),
                tokenize=False,
                add_generation_prompt=True,
                **dict(self.arguments),
            )
        )

    def probe_sha256(self) -> str:
        """Returns the SHA-256 of the token ids of a fixed text, raw and wrapped, which tells tokenizers apart.

        Raises UsageError, as `tokens` does, and for a tokenizer that cannot encode that text.
        """
        wrapped = self.text.replace(PROMPT, _PROBE)
        try:
            return ids_sha256([*encode(self.tokenizer, _PROBE), *self.encode(wrapped)])
        except Exception as error:  # whatever a tokenizer raises
            raise UsageError(f"The checkpoint's tokenizer cannot be used: {one_line(error)}") from error


def ids_sha256(token_ids: list[int]) -> str:
    """SHA-256 of token ids, written in decimal with commas between them."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()


def _damage(wrapped: str) -> str:
    if _WORD.lower() not in wrapped.lower():
        return "drops"
    return "repeats" if _PROBE in wrapped else "changes or cuts"


def _clock_macro() -> str:
    """A macro that stands for transformers' `strftime_now`, whose clock no argument can set.

    It ends in the newline that Jinja drops after a block, so that the template after it starts a line.
    """
    names = [f"%{flag}{letter}" for flag in ("-", "") for letter in string.ascii_letters if letter != "s"]
    pinned = [("%%", "\0"), *((name, CLOCK.strftime(name)) for name in names), ("\0", "%")]
    filters = "".join(f" | replace({json.dumps(name)}, {json.dumps(value)})" for name, value in pinned)
    return "{% macro strftime_now(format) %}{{ format" + filters + " }}{% endmacro %}\n"


_PINNED_CLOCK = _clock_macro()


def _bounded(render: Callable[[], str]) -> str:
    """Returns what `render` returns. Raises TimeoutError if it takes longer than _RENDER_S."""
    outcome: list[str | BaseException] = []

    def work() -> None:
        try:
            outcome.append(render())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_RENDER_S)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise TimeoutError(f"the chat template takes longer than {_RENDER_S:.0f} s to render")
    done = outcome[0]
    if isinstance(done, BaseException):
        raise done
    return done
