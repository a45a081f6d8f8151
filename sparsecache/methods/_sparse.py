"""What all sparse methods share: a budget, dense first layers, and the count of what was attended to.

It knows neither how past tokens are chosen nor how they are kept.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsecache.kernels.decode import Ledger
from sparsecache.methods._cache import FullCache
from sparsecache.methods._layers import Everywhere, PerLayer, per_layer
from sparsecache.methods.base import Method, Shape


def is_share_or_count(amount: float) -> bool:
    """Whether an amount of tokens is a share, above 0 up to 1, or a whole number above that."""
    return 0 < amount <= 1 or (math.isfinite(amount) and amount > 1 and amount == math.floor(amount))


@dataclass(frozen=True)
class Budget:
    """How many past tokens may be attended to: a share of them up to 1, above that a whole number."""

    amount: float

    def __post_init__(self) -> None:
        if not is_share_or_count(self.amount):
            raise ValueError(f"budget={self.amount} must be a share above 0 up to 1, or a whole number of tokens.")

    def cap(self, past: int) -> int:
        """Most tokens to be chosen of `past`: one at least."""
        return max(1, math.floor(self.amount * past + 1e-6)) if self.amount <= 1 else int(min(self.amount, 2**62))

    def caps(self, max_tokens: int) -> Tensor:
        """The caps of 0 to max_tokens past tokens, [max_tokens + 1] int64, as whole numbers that the host made."""
        return torch.tensor([self.cap(past) for past in range(max_tokens + 1)])


class Tally:
    """Per layer and slot: tokens held, and the share of past tokens attended to, over steps and sparse layers.

    caps: [T + 1], as Budget.caps makes them.
    """

    def __init__(self, devices: Sequence[torch.device], slots: int, kv_heads: int, caps: Tensor) -> None:
        self.caps, self._kv_heads = Everywhere(caps, devices), kv_heads
        self.past, self.steps, self.capped = (per_layer(devices, slots) for _ in range(3))
        self.kept = per_layer(devices, slots, kv_heads, dtype=torch.float64)
        self.fetched = per_layer(devices, slots, kv_heads)

    def of(self, layer: int) -> Ledger:
        """What one layer writes into."""
        past, kept, fetched, steps, capped = (counter[layer] for counter in self.counters)
        return Ledger(past, kept, fetched, steps, capped, self.caps.on(past))

    @property
    def counters(self) -> tuple[PerLayer, ...]:
        """All that is counted."""
        return self.past, self.kept, self.fetched, self.steps, self.capped

    def release(self, slot: int) -> None:
        """Starts a slot anew."""
        for counter in self.counters:
            counter[:, slot] = 0

    def report(self, slot: int) -> dict[str, Any]:
        """`kept` (mean share of past tokens attended to, None without a sparse step) and the steps it is over."""
        steps = self.steps[:, slot]
        total = int(steps.sum()) * self._kv_heads
        return {
            "kept": math.fsum(self.kept[:, slot].flatten().tolist()) / total if total else None,
            "sparse_steps": int(steps[0]) if len(steps) else 0,
            "capped_steps": int(self.capped[0, slot]) if len(steps) else 0,
        }


class SparseMethod(Method):
    """A method that attends to at most `budget` past tokens in every layer but the first `dense_layers`.

    A subclass makes its room (`make_room`), takes prompts (`take_prompt`) and attends (`attend_past`) for the
    sparse layers, which it sees numbered from 0; `self.shape`, `self.first` (the first sparse layer) and
    `self.devices` (of the sparse layers) are set.
    """

    least_dense = 0
    shape: Shape
    devices: tuple[torch.device, ...]

    def __init__(self, budget: float, dense_layers: int) -> None:
        self.budget, self.first = Budget(budget), dense_layers
        if dense_layers < self.least_dense:
            raise ValueError(f"dense_layers={dense_layers} must be {self.least_dense} or more.")

    def check(self, shape: Shape) -> None:
        """Raises ValueError if the model has fewer layers than are to stay dense."""
        if self.first > shape.layers:
            raise ValueError(
                f"dense_layers={self.first} must be {self.least_dense} to {shape.layers}, the layers of this model."
            )

    def allocate(self, shape: Shape, slots: int, max_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        self.check(shape)
        self.shape = shape
        places = shape.places(device)
        self.devices = places[self.first :]
        vars(self).pop("_dense", None)  # frees the old room before taking the new
        self._dense = FullCache(places[: self.first], slots, max_tokens, shape, dtype)
        self._most_past = max_tokens - 1
        self._tally = Tally(self.devices, slots, shape.kv_heads, self.budget.caps(max_tokens))
        self.make_room(len(self.devices), slots, max_tokens, device, dtype)

    def prefill(self, layer: int, slot: int, q: Tensor, k: Tensor, v: Tensor, max_new_tokens: int) -> None:
        if layer < self.first:
            self._dense.fill(layer, slot, k, v)
            return
        sparse = layer - self.first
        if sparse == 0:
            self._tally.release(slot)
        self._tally.past[sparse, slot].fill_(k.shape[1])
        self.take_prompt(sparse, slot, q, k, v, max_new_tokens)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        if layer < self.first:
            return self._dense.attend(layer, q, k, v, slots)
        sparse = layer - self.first
        past, cap = self.past_and_cap(sparse, slots)
        out, attended = self.attend_past(sparse, q, k, v, slots, past, cap)
        self.ledger(sparse).note(slots, attended, cap)
        return out

    def ledger(self, layer: int) -> Ledger:
        """Where a sparse layer writes down its steps."""
        return self._tally.of(layer)

    def fetched(self, slot: int) -> int:
        """Past tokens attended to, over steps, sparse layers and KV heads."""
        return int(self._tally.fetched[:, slot].sum())

    def past_and_cap(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Past tokens of each slot before this step, and how many of them may be attended to: [B], [B]."""
        past = self._tally.past[layer, slots].clamp(max=self._most_past)  # a slot not in flight may have run full
        return past, self.caps(past)

    def caps(self, past: Tensor) -> Tensor:
        """How many of `past` [B] tokens may be attended to: [B]."""
        return self._tally.caps.on(past)[past]

    def release(self, slot: int) -> None:
        self._dense.release(slot)
        self._tally.release(slot)

    def report(self, slot: int) -> dict[str, Any]:
        return {**self._tally.report(slot), "dense_layers": self.first}

    @abstractmethod
    def make_room(self, layers: int, slots: int, max_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        """Allocates what the sparse layers need, replacing any earlier room."""

    @abstractmethod
    def take_prompt(self, layer: int, slot: int, q: Tensor, k: Tensor, v: Tensor, max_new_tokens: int) -> None:
        """As `Method.prefill`, for a sparse layer."""

    @abstractmethod
    def attend_past(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, past: Tensor, cap: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `Method.attend`, for a sparse layer: over the new token and at most `cap` [B] of `past` [B] tokens.

        Returns the output and how many past tokens each KV head attended to, [B, G].
        """


class ChoosingMethod(SparseMethod):
    """A sparse method that keeps everything and chooses anew at every step: a subclass defines `choose`.

    What it saves is attention, not memory.
    """

    def make_room(self, layers: int, slots: int, max_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        vars(self).pop("cache", None)
        self.cache = FullCache(self.devices, slots, max_tokens, self.shape, dtype)

    def take_prompt(self, layer: int, slot: int, q: Tensor, k: Tensor, v: Tensor, max_new_tokens: int) -> None:
        self.cache.fill(layer, slot, k, v)

    def attend_past(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, past: Tensor, cap: Tensor
    ) -> tuple[Tensor, Tensor]:
        chosen = self.choose(layer, q, slots, past, cap)
        return self.cache.attend_selected(layer, q, k, v, slots, chosen), (chosen >= 0).sum(2)

    def release(self, slot: int) -> None:
        super().release(slot)
        self.cache.release(slot)

    @abstractmethod
    def choose(self, layer: int, q: Tensor, slots: Tensor, past: Tensor, cap: Tensor) -> Tensor:
        """The past positions that each KV head attends to: [B, G, N] int64, ascending, then -1.

        q: [B, H, 1, D]; slots, past (tokens held so far) and cap (most of them to choose): [B].
        """
