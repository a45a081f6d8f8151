"""The sparse layers where no token is ever evicted: kernels from the guess to the attention, the host is asked nothing.

A layer's selection, and with `offload` the fetching of what it selected, is made on a stream of its own while the layer
before attends and feeds forward. A step can therefore be a CUDA graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsecache.kernels.decode import Ledger, attend_gathered, attend_selected, gather
from sparsecache.kernels.speculation import Rule, Selected, remember, speculate
from sparsecache.methods._host import put
from sparsecache.methods._layers import Everywhere, per_layer
from sparsecache.methods.base import Shape
from sparsecache.methods.infinigen.speculation import PartialKeys


@dataclass(frozen=True)
class _Guess:
    """What is ready for a layer: its selection, fetched rows with offload, and when the side stream has made them.

    `asked` is only held so that its memory stays until then.
    """

    selected: Selected
    rows: Tensor | None
    made: Any
    asked: Tensor


class Unbounded:
    """Keys and values of the sparse layers and all slots, and what their guesses select.

    store: [layers, slots, G, T, 2, D], key and value side by side, on the device or in pinned host memory.
    """

    def __init__(
        self,
        partial: PartialKeys,
        rule: Rule,
        devices: Sequence[torch.device],
        slots: int,
        shape: Shape,
        offload: bool,
    ) -> None:
        """`devices` of the sparse layers; `rule` with the caps on any of them."""
        size = (slots, shape.kv_heads, partial.rows, 2, shape.head_dim)
        self.store = per_layer(devices, *size, dtype=partial.dtype, offload=offload)
        self._partial, self._rule, self._offload = partial, rule, offload
        self._caps = Everywhere(rule.caps, devices)
        self._width = min(partial.rows, int(rule.caps.max()))
        self._guesses: dict[int, _Guess] = {}
        streams: Any = torch.cuda.Stream
        self._sides: dict[int | None, Any] = {
            device.index: streams(device, priority=-1) for device in set(devices) if device.type == "cuda"
        }

    def fill(self, layer: int, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Takes a prompt's q [H, L, D], k and v [G, L, D] into an empty slot."""
        self._partial.keep(layer, slot, self._partial.fill(layer, slot, q, k))
        rows, side = torch.stack((k, v), 2), self._side(k.device)
        if not self._offload or side is None:
            put(rows, self.store[layer, slot])
            return
        main = torch.cuda.current_stream(k.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):  # while the next layer computes
            put(rows, self.store[layer, slot])
        rows.record_stream(side)
        if layer == len(self.store) - 1:
            main.wait_stream(side)

    def anticipate(self, layer: int, q: Tensor, slots: Tensor, past: Tensor) -> None:
        """Selects for a layer, of past [slots] tokens, by the guessed q [B, H, 1, D]."""
        side = self._side(q.device)
        if side is not None:
            side.wait_stream(torch.cuda.current_stream(q.device))
        with torch.cuda.stream(side):  # None: where it is
            self._guesses[layer] = self._guess(layer, q, slots, past, side)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, ledger: Ledger) -> Tensor:
        """Attention of q [B, H, 1, D] over the layer's selection and the new token k, v [B, G, 1, D], which is kept."""
        guess = self._guesses.pop(layer)
        if guess.made is not None:
            torch.cuda.current_stream(q.device).wait_event(guess.made)
        counts, store = guess.selected.counts, self.store[layer]
        if guess.rows is not None:
            out = attend_gathered(q, k, v, guess.rows, counts)
        else:
            positions = guess.selected.positions
            out = attend_selected(q, k, v, store[..., 0, :], store[..., 1, :], slots, positions, counts)
        remember(k, v, self._partial.mixing[layer], self._partial.keys[layer], store, ledger.past, slots)
        ledger.note(slots, counts)
        return out

    def selected(self, layer: int) -> Tensor:
        """What is selected for a layer that has not attended yet: [B, G, N], ascending, then -1."""
        guess = self._guesses[layer]
        if guess.made is not None:
            guess.made.synchronize()
        positions, counts = guess.selected
        return positions.masked_fill(torch.arange(positions.shape[2], device=counts.device) >= counts[..., None], -1)

    def _side(self, device: torch.device) -> Any:
        """The stream on which a device's guesses are made; None on the CPU."""
        return self._sides.get(device.index, self._sides.get(None)) if device.type == "cuda" else None

    def _guess(self, layer: int, q: Tensor, slots: Tensor, past: Tensor, side: Any) -> _Guess:
        mixing, keys = self._partial.mixing[layer], self._partial.keys[layer]
        rule = self._rule._replace(caps=self._caps.on(past))
        selected = speculate(q, mixing, keys, past, slots, rule, self._width)
        rows = gather(self.store[layer], slots, *selected) if self._offload else None
        return _Guess(selected, rows, side and side.record_event(), q)
