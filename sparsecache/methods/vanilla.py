"""Vanilla: the full cache, every past token attended to. What every other method is measured against."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsecache.kernels.attention import attention
from sparsecache.methods.base import Method, Shape


class Vanilla(Method):
    """Keeps and attends to everything."""

    lossless: ClassVar[dict[str, Any] | None] = {}

    def allocate(self, shape: Shape, slots: int, max_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        self._keys = self._values = torch.empty(0)  # free the old room before taking the new
        size = (shape.layers, slots, shape.kv_heads, max_tokens, shape.head_dim)
        self._keys = torch.zeros(size, device=device, dtype=dtype)
        self._values = torch.zeros(size, device=device, dtype=dtype)
        self._lengths = torch.zeros((shape.layers, slots), device=device, dtype=torch.int64)
        self._positions = torch.arange(max_tokens, device=device)

    def prefill(self, layer: int, slot: int, q: Tensor, k: Tensor, v: Tensor, max_new_tokens: int) -> None:
        length = k.shape[1]
        self._keys[layer, slot, :, :length] = k
        self._values[layer, slot, :, :length] = v
        self._lengths[layer, slot] = length

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        lengths = self._lengths[layer]
        last = lengths[slots].clamp(max=len(self._positions) - 1)  # [B]; a slot not in flight may have run full
        self._keys[layer, slots, :, last] = k[:, :, 0]
        self._values[layer, slots, :, last] = v[:, :, 0]
        lengths[slots] = last + 1
        longest = int(lengths.max())
        keys, values = self._keys[layer, :, :, :longest], self._values[layer, :, :, :longest]
        if len(lengths) == 1:
            return attention(q, keys, values)
        # All slots in one call, so that no cache is copied: rows of slots not asked for are dropped again.
        every = q.new_zeros((len(lengths), *q.shape[1:]))
        every[slots] = q
        seen = self._positions[:longest] < lengths.clamp(min=1)[:, None]  # [slots, longest]
        return attention(every, keys, values, mask=seen[:, None, None])[slots]

    def release(self, slot: int) -> None:
        self._lengths[:, slot] = 0
