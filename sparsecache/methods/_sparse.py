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

from sparsecache.methods._cache import FullCache
from sparsecache.methods._layers import Everywhere, per_layer
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
    """Per slot: the share of past tokens attended to, over steps and sparse layers."""

    def __init__(self, devices: Sequence[torch.device], slots: int) -> None:
        self._shares = per_layer(devices, slots, dtype=torch.float64)
        self._steps = per_layer(devices, slots)
        self._capped = per_layer(devices, slots)

    def note(self, layer: int, slots: Tensor, attended: Tensor, past: Tensor, cap: Tensor) -> None:
        """One step of a layer: `attended` [B, G] of `past` [B] tokens, where at most `cap` [B] could have been."""
        self._shares[layer, slots] += attended.double().mean(1) / past.clamp(min=1)
        self._steps[layer, slots] += 1
        self._capped[layer, slots] += past > cap

    def release(self, slot: int) -> None:
        """Starts a slot anew."""
        for counts in (self._shares, self._steps, self._capped):
            counts[:, slot] = 0

    def report(self, slot: int) -> dict[str, Any]:
        """`kept` (mean share of past tokens attended to, None without a sparse step) and the steps it is over."""
        steps = self._steps[:, slot]
        total = int(steps.sum())
        return {
            "kept": float(self._shares[:, slot].sum()) / total if total else None,
            "sparse_steps": int(steps[0]) if len(steps) else 0,
            "capped_steps": int(self._capped[0, slot]) if len(steps) else 0,
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
        self._past = per_layer(self.devices, slots)
        self._most_past = max_tokens - 1
        self._caps = Everywhere(self.budget.caps(max_tokens), self.devices)
        self._tally = Tally(self.devices, slots)
        self.make_room(len(self.devices), slots, max_tokens, device, dtype)

    def prefill(self, layer: int, slot: int, q: Tensor, k: Tensor, v: Tensor, max_new_tokens: int) -> None:
        if layer < self.first:
            self._dense.fill(layer, slot, k, v)
            return
        sparse = layer - self.first
        if sparse == 0:
            self._tally.release(slot)
        self._past[sparse, slot] = k.shape[1]
        self.take_prompt(sparse, slot, q, k, v, max_new_tokens)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        if layer < self.first:
            self._dense.append(layer, k, v, slots)
            return self._dense.attend(layer, q, slots)
        sparse = layer - self.first
        past, cap = self.past_and_cap(sparse, slots)
        out, attended = self.attend_past(sparse, q, k, v, slots, past, cap)
        self._tally.note(sparse, slots, attended, past, cap)
        self._past[sparse, slots] = past + 1
        return out

    def past_and_cap(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Past tokens of each slot before this step, and how many of them may be attended to: [B], [B]."""
        past = self._past[layer, slots].clamp(max=self._most_past)  # a slot not in flight may have run full
        return past, self.caps(past)

    def caps(self, past: Tensor) -> Tensor:
        """How many of `past` [B] tokens may be attended to: [B]."""
        return self._caps.on(past)[past]

    def release(self, slot: int) -> None:
        self._dense.release(slot)
        self._past[:, slot] = 0
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
        current = self.cache.append(layer, k, v, slots)
        with_current = torch.cat((chosen, current[:, None, None].expand(*chosen.shape[:2], 1)), 2)
        return self.cache.attend(layer, q, slots, with_current), (chosen >= 0).sum(2)

    def release(self, slot: int) -> None:
        super().release(slot)
        self.cache.release(slot)

    @abstractmethod
    def choose(self, layer: int, q: Tensor, slots: Tensor, past: Tensor, cap: Tensor) -> Tensor:
        """The past positions that each KV head attends to: [B, G, N] int64, ascending, then -1.

        q: [B, H, 1, D]; slots, past (tokens held so far) and cap (most of them to choose): [B].
        """
