"""The sparse layers where no token is ever evicted: kernels from the guess to the attention, the host is asked nothing.

A layer's selection, and with `offload` the fetching of what it selected, is made beside the main stream while the layer
before attends and feeds forward; so is a new token put away. A step can be a CUDA graph.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsecache.kernels.cut import Rule, Selected, take_nearest
from sparsecache.kernels.decode import Ledger, attend_selected
from sparsecache.kernels.fetch import Fetched, gather
from sparsecache.kernels.speculation import remember, speculate
from sparsecache.methods._host import put
from sparsecache.methods._layers import per_layer
from sparsecache.methods._side import Sides
from sparsecache.methods.base import Shape
from sparsecache.methods.infinigen.gpu_cache import GpuCache
from sparsecache.methods.infinigen.speculation import PartialKeys


@dataclass(frozen=True)
class _Guess:
    """What is ready for a layer: its selection, fetched rows with offload, and when, on a GPU, they are made."""

    selected: Selected
    fetched: Fetched | None
    made: Any


class Unbounded:
    """Keys and values of the sparse layers and all slots, and what their guesses select.

    store: [layers, slots, G, T, 2, D], key and value side by side, on the device or in pinned host memory.
    sides: where guesses are to be made.
    """

    def __init__(
        self,
        partial: PartialKeys,
        rule: Rule,
        devices: Sequence[torch.device],
        slots: int,
        shape: Shape,
        offload: bool,
        gpu_cache: GpuCache | None,
    ) -> None:
        """`devices` of the sparse layers; `rule` with the caps on any of them; `gpu_cache` with `offload` alone."""
        size = (slots, shape.kv_heads, partial.rows, 2, shape.head_dim)
        self.store = per_layer(devices, *size, dtype=partial.dtype, offload=offload)
        self._partial, self._rule, self._offload, self._gpu_cache = partial, rule, offload, gpu_cache
        self._width = min(partial.rows, int(rule.caps.max()))
        self._guesses: dict[int, _Guess] = {}
        # Rows may still be fetched, and new tokens put away, when the next guess begins. With offload all of these go
        # first, for the link is what a step then waits for, and what is fetched may wait for what is kept; else they
        # take turns with the main stream.
        self.sides, self._keeping = (Sides(devices, first=offload) for _ in range(2))
        self._links = Sides(devices if offload else [], first=True)
        # The projections of one sequence are thousands of small programs, and a cut that takes turns with them would
        # wait until all have begun.
        self._urgent = Sides([] if offload else devices, first=True)
        self._cached: Any = None  # when, on a GPU, the latest layer's rows are in the cache
        self._sent: Tensor | None = None  # rows of a prompt on their way to the host
        # Of each layer, whether it is the last on its device, which waits for all that is done beside it.
        self._ends = [here != after for here, after in zip(devices, [*devices[1:], None], strict=True)]

    def fill(self, layer: int, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Takes a prompt's q [H, L, D], k and v [G, L, D] into an empty slot."""
        self._partial.keep(layer, slot, self._partial.fill(layer, slot, q, k))
        room = self.store[layer, slot]
        if not self._offload:
            put(k, room[:, :, 0])
            put(v, room[:, :, 1])
            return
        # The rows of one layer are on the device at most, however far the host is ahead.
        self._links.join(k.device)
        self._sent = None
        self._sent = torch.stack((k, v), 2)
        with self._links.after(k.device):  # to the host while the next layer computes
            put(self._sent, room)
        if self._ends[layer]:
            self._links.join(k.device)
            self._sent = None

    def anticipate(self, layer: int, q: Tensor, slots: Tensor, ledger: Ledger) -> None:
        """Selects for a layer, of the past tokens in its ledger, by the guessed q [B, H, 1, D]."""
        mixing, keys, past = self._partial.mixing[layer], self._partial.keys[layer], ledger.past
        rule = self._rule._replace(caps=ledger.caps)
        scores = speculate(q, mixing, keys, past, slots, first=self._offload)
        with self._urgent.in_turn(q.device) if len(slots) == 1 else nullcontext():
            selected = take_nearest(scores, past, slots, rule, self._width)
        if not self._offload:
            self._guesses[layer] = _Guess(selected, None, _now(q.device))
            return
        recent = self._gpu_cache.of(layer) if self._gpu_cache is not None else None
        with self._links.reading(slots, *selected):
            if self._cached is not None:  # rows of the latest layer that has attended, whose memory these may take
                torch.cuda.current_stream(q.device).wait_event(self._cached)
            fetched = gather(self.store[layer], slots, *selected, recent)
            self._guesses[layer] = _Guess(selected, fetched, _now(q.device))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, ledger: Ledger) -> Tensor:
        """Attention of q [B, H, 1, D] over the layer's selection and the new token k, v [B, G, 1, D], which is kept."""
        guess = self._guesses.pop(layer)
        if guess.made is not None:
            torch.cuda.current_stream(q.device).wait_event(guess.made)
        counts, store = guess.selected.counts, self.store[layer]
        if guess.fetched is not None:
            out = guess.fetched.attend(q, k, v, counts)
        else:
            positions = guess.selected.positions
            out = attend_selected(q, k, v, store[..., 0, :], store[..., 1, :], slots, positions, counts)
        with self._keeping.reading(k, v, slots, *guess.selected):  # only the next step reads what is written here
            remember(k, v, self._partial.mixing[layer], self._partial.keys[layer], store, ledger.past, slots)
            ledger.note(slots, counts)
            if guess.fetched is not None:
                guess.fetched.keep(slots, *guess.selected)
            if self._gpu_cache is not None:
                self._cached = _now(q.device)
        if self._ends[layer]:
            self._cached = None
            for beside in (self.sides, self._keeping, self._links):
                beside.join(q.device)
        return out

    def selected(self, layer: int) -> Tensor:
        """What is selected for a layer that has not attended yet: [B, G, N], ascending, then -1."""
        guess = self._guesses[layer]
        if guess.made is not None:
            guess.made.synchronize()
        positions, counts = guess.selected
        behind = torch.arange(positions.shape[2], device=counts.device) >= counts[..., None]
        last = self._partial.rows  # behind all positions
        positions = positions.masked_fill(behind, last).sort(dim=2).values
        return positions.masked_fill(positions == last, -1)


def _now(device: torch.device) -> Any:
    """An event of the current stream of a GPU; None on the CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
