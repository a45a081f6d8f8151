"""What an engine is asked and what it answers, and what all engines answer alike."""

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Request:
    """A prompt to be continued greedily.

    Generation ends after a stop id (which is kept) or max_new_tokens; before min_new_tokens stop ids are
    masked. `key` is the caller's own.
    """

    key: Any
    token_ids: list[int]
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    min_new_tokens: int = 0


@dataclass(frozen=True)
class Completion:
    """What became of a request.

    token_ids: new tokens, the stop id included. finish_reason: "stop" or "length". prefill_s: start of the prompt to
    first token, and on a GPU until the next prompt is planned, if that takes longer (`Decoder.expect`); decode_s: first
    to last token, on the wall clock. report: what the method kept. error: set instead of all these when the request
    failed.
    """

    request: Request
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    prefill_s: float = 0.0
    decode_s: float = 0.0
    report: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def key(self) -> Any:
        """The request's key."""
        return self.request.key


@dataclass
class Clock:
    """The engine's own totals: seconds spent in prefill and in decode steps, never overlapping.

    A device may go on with a step while whoever asked has a completion to deal with: that time is in neither.
    """

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    peak_gpu_bytes: int | None = None

    def note_memory(self, *devices: torch.device) -> None:
        """Takes down the peak of GPU memory so far, of the device where it is highest."""
        if devices[0].type == "cuda":
            self.peak_gpu_bytes = max(map(torch.cuda.max_memory_allocated, devices))


Tick = Callable[[int], None]
"""Is told how many new tokens there are, whenever there are some."""


class Engine(Protocol):
    """Anything that continues prompts."""

    @property
    def clock(self) -> Clock:
        """Its own totals."""

    def reserve(self, max_tokens: int, max_new_tokens: int | None = None) -> None:
        """Allocate for sequences of max_tokens, at most max_new_tokens of them new (None: all), where that helps."""

    def reset_clock(self) -> None:
        """Starts the totals and the peak of GPU memory anew."""

    def session(self) -> dict[str, Any]:
        """What run.json records of the work so far: the clock, and whatever else is known of who did it."""

    def generate(self, requests: Iterable[Request], tick: Tick = ...) -> Iterator[Completion]:
        """Yields a completion for every request, in the order in which they end."""


def no_tick(tokens: int) -> None:
    """Nobody watches."""


def failure(request: Request, error: Exception) -> Completion:
    """The completion of a request that raised: its traceback goes to stderr, one line of it to the record."""
    traceback.print_exception(error, file=sys.stderr)
    error.__traceback__ = None  # it holds the frames, and the frames hold the tensors that did not fit
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    first_line = (str(error).splitlines() or [""])[0]
    return Completion(request, error=f"{type(error).__name__}: {first_line}")


def not_finite(request: Request, new_tokens: int) -> Completion:
    """The completion of a request whose logits were not finite after `new_tokens` tokens."""
    return Completion(
        request,
        error=f"NonFiniteLogits: the logits of new token {new_tokens + 1} are NaN or infinite. The weights or "
        f"config.json of the checkpoint are broken, or values overflow the dtype: try --dtype float32.",
    )


def fresh_clock(*devices: torch.device) -> Clock:
    """A clock at zero, with the peak of GPU memory forgotten."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
    return Clock()
