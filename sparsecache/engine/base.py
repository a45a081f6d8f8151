"""The interface of an engine: requests, completions and statistics, and the completions of failed requests."""

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsecache.cache.model_cache import ModelCache


@dataclass(frozen=True)
class Request:
    """A prompt to continue greedily.

    Generation ends with a stop id, which is part of the output, or after max_new_tokens. Stop ids are masked for
    the first min_new_tokens tokens. key: an object of the caller's that identifies the request.
    """

    key: Any
    token_ids: list[int]
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    min_new_tokens: int = 0


@dataclass(frozen=True)
class Completion:
    """The result of a request.

    token_ids: new tokens, the stop id included. finish_reason: "stop" or "length". prefill_s: seconds of wall time from
    the start of the prompt to the first token; on a GPU they include the attention plan of the next prompt
    (`Decoder.warm_attention_plan`) if that takes longer. shared_prefill_s: those of them in which the prompt was
    prefilled for several methods at once. decode_s: seconds of wall time from the first to the last token. report: what
    the method reports of the cache. error: why the request failed; the other fields are then empty.
    """

    request: Request
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    prefill_s: float = 0.0
    decode_s: float = 0.0
    report: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    shared_prefill_s: float = 0.0

    @property
    def key(self) -> Any:
        """Return the request's key."""
        return self.request.key


@dataclass
class EngineStats:
    """Totals of an engine: tokens, and seconds of prefill and of decode steps, which never overlap.

    The time in which the caller handles a completion counts as neither, though a step may be in flight. A prompt that
    was prefilled once for several methods counts in full for each.
    """

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    peak_gpu_bytes: int | None = None

    def record_peak_memory(self, *devices: torch.device) -> None:
        """Record the peak of GPU memory so far, of the device where it is highest."""
        if devices[0].type == "cuda":
            self.peak_gpu_bytes = max(map(torch.cuda.max_memory_allocated, devices))


OnTokens = Callable[[int], None]
"""A callback that receives the number of new tokens after each prefill and each step."""


class Engine(Protocol):
    """An engine that continues prompts."""

    @property
    def stats(self) -> EngineStats:
        """Return the totals since the last `reset_stats`."""

    def reserve(self, max_tokens: int, max_new_tokens: int | None = None) -> None:
        """Allocate memory for sequences of max_tokens, max_new_tokens of them new at most (None: all may be)."""

    def reset_stats(self) -> None:
        """Set the totals and the peak of GPU memory to zero."""

    def session(self) -> dict[str, Any]:
        """Return what run.json records of the work so far: the stats as "clock", and facts about workers."""

    def generate(self, requests: Iterable[Request], on_tokens: OnTokens = ...) -> Iterator[Completion]:
        """Yield a completion per request, in the order in which they end."""


class SlotDecoder(Protocol):
    """A model that prefills prompts into slots and decodes one token per slot.

    device: of token ids. cache: the caches, None before `allocate`. shared_prefill_s: seconds of the latest prompt's
    prefill if a prefill cache already held it, else 0.
    """

    device: torch.device
    cache: ModelCache | None
    shared_prefill_s: float

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Return the devices of the layers."""

    @property
    def graphable(self) -> bool:
        """Return whether a step may be captured in a CUDA graph. Requires `allocate`."""

    def allocate(self, slots: int, max_tokens: int, max_new_tokens: int) -> None:
        """Allocate caches for `slots` sequences of at most max_tokens tokens; earlier ones are freed first."""

    def prompt_nbytes(self, tokens: int) -> int:
        """Return an estimate of the peak bytes of a prefill, without weights and caches."""

    def warm_attention_plan(self, tokens: int) -> None:
        """Plan the attention over a prompt of this length on the host, where that takes time."""

    def prefill(self, token_ids: Tensor, slot: int) -> Tensor:
        """Prefill a prompt, token_ids: [L], into a free slot; return the last token's logits [V]."""

    def step(self, token_ids: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """Decode one token per slot: token_ids, positions and slots [B] on the device; return logits [B, V]."""


def ignore_tokens(tokens: int) -> None:
    """Ignore the number of new tokens: the default callback."""


def failed_completion(request: Request, error: Exception) -> Completion:
    """Return the completion of a request that raised an error, and print the traceback on stderr."""
    traceback.print_exception(error, file=sys.stderr)
    error.__traceback__ = None  # its frames hold tensors, which would keep memory in use
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    first_line = (str(error).splitlines() or [""])[0]
    return Completion(request, error=f"{type(error).__name__}: {first_line}")


def not_finite_completion(request: Request, new_tokens: int) -> Completion:
    """Return the completion of a request whose logits were not finite after `new_tokens` tokens."""
    return Completion(
        request,
        error=f"NonFiniteLogits: the logits of new token {new_tokens + 1} are NaN or infinite. The weights or "
        f"config.json of the checkpoint are broken, or values overflow the dtype: try --dtype float32.",
    )


def new_stats(*devices: torch.device) -> EngineStats:
    """Return empty stats, and reset the peak of GPU memory of the devices."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
    return EngineStats()
