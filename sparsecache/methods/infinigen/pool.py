"""The pool that holds keys and values of the sparse layers: rows for tokens, victims when it is full.

A sequence holds at most its capacity of tokens in each layer and KV head. As long as nothing was evicted, row i is
position i. Knows nothing of scores; it is told which rows were selected.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from sparsecache.kernels.rows import take_rows
from sparsecache.methods._layers import Everywhere, keys_and_values, per_layer
from sparsecache.methods.base import Shape

Eviction = Literal["fifo", "lru", "counter"]
EVICTIONS = get_args(Eviction)
SATURATED = 255
_EMPTY = 2**31 - 1


class Pool:
    """Rows of all sparse layers and slots, allocated once, on the device or (`offload`) in pinned host memory.

    positions, last_selected, selections: [layers, slots, G, rows]: which token a row holds (a huge number: none),
    the position of the query that selected it last (at first its own), and how often it was selected.
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        slots: int,
        rows: int,
        shape: Shape,
        eviction: Eviction,
        offload: bool,
        dtype: torch.dtype,
    ) -> None:
        size = (slots, shape.kv_heads, rows)
        self._where = [torch.device("cpu")] * len(devices) if offload else list(devices)
        self.keys, self.values = keys_and_values(devices, *size, shape.head_dim, dtype=dtype, offload=offload)
        self.positions = per_layer(devices, *size, fill=_EMPTY)
        self.last_selected = per_layer(devices, *size)
        self.selections = per_layer(devices, *size)
        self._held = per_layer(devices, slots)
        self._capacity = per_layer(devices, slots, fill=rows)
        self._eviction, self._rows = eviction, rows
        self._heads = Everywhere(torch.arange(shape.kv_heads), devices)
        self._evicted = [False] * slots  # whether a row may hold another position than its own

    def rows_held(self, layer: int) -> int:
        """How many rows, counted from the first, hold the tokens of all slots."""
        return int(self._held[layer].max())

    def fill(
        self, layer: int, slot: int, k: Tensor, v: Tensor, capacity: int, selections: "Selections | None"
    ) -> Tensor:
        """Takes a prompt's k and v [G, L, D] into an empty slot that may hold `capacity` tokens.

        A longer prompt is cut to that by the eviction policy, from the selections that `selections` counted. Returns
        the positions that stay, ascending: [G, at most capacity].
        """
        length = k.shape[1]
        kept = torch.arange(length, device=k.device).expand(len(k), -1)
        state = selections or Selections(len(k), length, k.device)
        if length > capacity:
            kept = state.survivors(self._eviction, capacity)
            k, v = (x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1])) for x in (k, v))
        held = kept.shape[1]
        self._evicted[slot] = length > capacity
        self._capacity[layer, slot].fill_(capacity)
        self._held[layer, slot].fill_(held)
        where = self._where[layer]
        self.keys[layer, slot, :, :held], self.values[layer, slot, :, :held] = k.to(where), v.to(where)
        self.positions[layer, slot] = _EMPTY
        self.positions[layer, slot, :, :held] = kept
        self.last_selected[layer, slot, :, :held] = state.last_selected.gather(1, kept)
        self.selections[layer, slot, :, :held] = state.selections.gather(1, kept)
        return kept

    def order(self, layer: int, slots: Tensor, rows: int) -> Tensor | None:
        """The first `rows` rows by rising position, [B, G, rows]; None where row i holds position i."""
        if not any(self._evicted):
            return None
        return self.positions[layer, slots, :, :rows].argsort(dim=-1, stable=True)

    def empty(self, layer: int, slots: Tensor, rows: int) -> Tensor | None:
        """Which of the first `rows` rows, `rows_held` of them, hold no token: [B, rows]; None if there is one slot."""
        if len(self._evicted) == 1:
            return None
        return torch.arange(rows, device=slots.device) >= self._held[layer, slots][:, None]

    def fetch(self, layer: int, slots: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `rows` [B, G, N] (-1: anything): two [B, G, N, D] on the device."""
        device, where = rows.device, self._where[layer]
        slots, rows = slots.to(where), rows.clamp(min=0).to(where)
        stores = self.keys[layer], self.values[layer]
        k, v = (take_rows(store, slots, rows).to(device, non_blocking=True) for store in stores)
        return k, v

    def note_selected(self, layer: int, slots: Tensor, rows: Tensor, at: Tensor) -> None:
        """Counts a selection of `rows` [B, G, N] (-1: none) by the queries at positions `at` [B]."""
        index = (slots[:, None], self._heads.on(slots))
        chosen = torch.zeros(*rows.shape[:2], self._rows + 1, device=rows.device, dtype=torch.bool)
        chosen.scatter_(2, rows.masked_fill(rows < 0, self._rows), True)
        chosen = chosen[..., :-1]
        counts = _counted(self.selections[layer][index], chosen)
        self.selections[layer][index] = counts
        self.last_selected[layer][index] = torch.where(chosen, at[:, None, None], self.last_selected[layer][index])

    def append(self, layer: int, slots: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        """Takes one token [B, G, 1, D] at `position` [B] into each slot, in place of a victim where it is full.

        Returns its row for each KV head, [B, G].
        """
        held, capacity = self._held[layer, slots], self._capacity[layer, slots]
        full = held >= capacity
        rows = torch.where(full, capacity - 1, held)[:, None].expand(-1, k.shape[1])
        if bool(full.any()):
            rows = torch.where(full[:, None], self._victims(layer, slots), rows)
            for slot in slots[full].tolist():
                self._evicted[slot] = True
        index = (slots[:, None], self._heads.on(slots), rows)
        where = self._where[layer]
        at = tuple(x.to(where) for x in index)
        self.keys[layer][at], self.values[layer][at] = k[:, :, 0].to(where), v[:, :, 0].to(where)
        self.positions[layer][index] = position[:, None]
        self.last_selected[layer][index] = position[:, None]
        self.selections[layer][index] = 0
        self._held[layer, slots] = torch.minimum(held + 1, capacity)
        return rows

    def release(self, slot: int) -> None:
        """Forgets a slot."""
        self._held[:, slot] = 0
        self._evicted[slot] = False
        self.positions[:, slot] = _EMPTY

    def _victims(self, layer: int, slots: Tensor) -> Tensor:
        """The row of each KV head that is to be replaced: [B, G]."""
        positions = self.positions[layer, slots]
        worth = _worth(self._eviction, positions, self.last_selected[layer, slots], self.selections[layer, slots])
        return worth.masked_fill(positions == _EMPTY, torch.iinfo(torch.int64).max).argmin(-1)


class Selections:
    """Which tokens of a prompt its last queries select, for a prompt that is longer than the pool."""

    def __init__(self, kv_heads: int, length: int, device: torch.device) -> None:
        self.positions = torch.arange(length, device=device).expand(kv_heads, -1)
        self.last_selected = self.positions.clone()
        self.selections = torch.zeros(kv_heads, length, device=device, dtype=torch.int64)

    def note(self, positions: Tensor, at: int) -> None:
        """Counts a selection of `positions` [G, N] (-1: none) by the query at position `at`."""
        chosen = torch.zeros(len(positions), self.positions.shape[1] + 1, device=positions.device, dtype=torch.bool)
        chosen = chosen.scatter_(1, positions.masked_fill(positions < 0, self.positions.shape[1]), True)[:, :-1]
        self.selections = _counted(self.selections, chosen)
        self.last_selected = self.last_selected.masked_fill(chosen, at)

    def survivors(self, eviction: Eviction, capacity: int) -> Tensor:
        """The `capacity` positions of each KV head that are evicted last, ascending: [G, capacity]."""
        worth = _worth(eviction, self.positions, self.last_selected, self.selections)
        return worth.topk(capacity, -1).indices.sort(-1).values


def _counted(selections: Tensor, chosen: Tensor) -> Tensor:
    """One more selection of the chosen; all counters of a KV head halve when one saturates."""
    selections = selections + chosen.long()
    return torch.where((selections >= SATURATED).any(-1, keepdim=True), selections // 2, selections)


def _worth(eviction: Eviction, positions: Tensor, last_selected: Tensor, selections: Tensor) -> Tensor:
    """The lowest is evicted first; ties go to the lower position."""
    first = {"fifo": positions, "lru": last_selected, "counter": selections}[eviction]
    return first * 2**32 + positions
