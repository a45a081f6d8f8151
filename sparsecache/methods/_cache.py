"""Keys and values of all past tokens, a row for each position: what vanilla attends to, and others choose from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsecache.kernels.attention import attention
from sparsecache.methods._layers import Everywhere, per_layer
from sparsecache.methods.base import Shape


class FullCache:
    """The cache of all slots and of a layer for each of `devices`, allocated once.

    keys, values: [layers, slots, G, max_tokens, D]; lengths: [layers, slots], tokens held.
    """

    def __init__(
        self, devices: Sequence[torch.device], slots: int, max_tokens: int, shape: Shape, dtype: torch.dtype
    ) -> None:
        size = (slots, shape.kv_heads, max_tokens, shape.head_dim)
        self.keys = per_layer(devices, *size, dtype=dtype)
        self.values = per_layer(devices, *size, dtype=dtype)
        self.lengths = per_layer(devices, slots)
        self._last = max_tokens - 1
        self._positions = Everywhere(torch.arange(max_tokens), devices)

    def fill(self, layer: int, slot: int, k: Tensor, v: Tensor) -> None:
        """Takes a prompt's k and v [G, L, D] into an empty slot."""
        length = k.shape[1]
        self.keys[layer, slot, :, :length] = k
        self.values[layer, slot, :, :length] = v
        self.lengths[layer, slot] = length

    def append(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        """Takes one token [B, G, 1, D] into each slot and returns its position [B].

        A slot that is not in flight may have run full: its last row is written again.
        """
        last = self.lengths[layer, slots].clamp(max=self._last)
        self.keys[layer, slots, :, last] = k[:, :, 0]
        self.values[layer, slots, :, last] = v[:, :, 0]
        self.lengths[layer, slots] = last + 1
        return last

    def attend(self, layer: int, q: Tensor, slots: Tensor, selected: Tensor | None = None) -> Tensor:
        """Attention of q [B, H, 1, D] over its slot: over all tokens, or `selected` [B, G, N] (kernels.attention)."""
        lengths = self.lengths[layer]
        longest = int(lengths.max())
        keys, values = self.keys[layer, :, :, :longest], self.values[layer, :, :, :longest]
        if len(lengths) == 1:
            return attention(q, keys, values, selected=selected)
        # All slots in one call, so that no cache is copied: rows of slots not asked for are dropped again.
        every = q.new_zeros((len(lengths), *q.shape[1:]))
        every[slots] = q
        if selected is not None:
            chosen = selected.new_zeros((len(lengths), *selected.shape[1:]))
            chosen[slots] = selected
            return attention(every, keys, values, selected=chosen)[slots]
        seen = self._positions.on(q)[:longest] < lengths.clamp(min=1)[:, None]  # [slots, longest]
        return attention(every, keys, values, mask=seen[:, None, None])[slots]

    def release(self, slot: int) -> None:
        """Forgets a slot."""
        self.lengths[:, slot] = 0
