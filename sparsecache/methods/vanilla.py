"""Vanilla: the full cache, every past token attended to. What every other method is measured against."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsecache.methods._cache import FullCache
from sparsecache.methods.base import Method, Shape


class Vanilla(Method):
    """Keeps and attends to everything."""

    lossless: ClassVar[dict[str, Any] | None] = {}
    _cache: FullCache

    def allocate(self, shape: Shape, slots: int, max_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        vars(self).pop("_cache", None)  # frees the old room before taking the new
        self._cache = FullCache(shape.places(device), slots, max_tokens, shape, dtype)

    def prefill(self, layer: int, slot: int, q: Tensor, k: Tensor, v: Tensor, max_new_tokens: int) -> None:
        self._cache.fill(layer, slot, k, v)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        self._cache.append(layer, k, v, slots)
        return self._cache.attend(layer, q, slots)

    def release(self, slot: int) -> None:
        self._cache.release(slot)
