"""Vanilla: the full cache, every past token attended to. What every other method is measured against."""

from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from sparsecache.methods._cache import FullCache
from sparsecache.methods.base import Method, Shape


class Vanilla(Method):
    """Keeps and attends to everything."""

    graphable = True
    lossless: ClassVar[dict[str, Any] | None] = {}
    _offload = False
    _cache: FullCache

    def __init__(
        self, offload: Annotated[bool, "keep keys and values in pinned host memory, read whole at every step"] = False
    ) -> None:
        self._offload = offload

    def allocate(self, shape: Shape, slots: int, max_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        vars(self).pop("_cache", None)  # frees the old room before taking the new
        self._prompts: dict[int, int] = {}  # tokens of each slot's prompt
        self._too_far: set[int] = set()  # slots whose last step does not count
        self._token_nbytes = shape.kv_nbytes(dtype)
        self._cache = FullCache(shape.places(device), slots, max_tokens, shape, dtype, self._offload)

    def prefill(self, layer: int, slot: int, q: Tensor, k: Tensor, v: Tensor, max_new_tokens: int) -> None:
        self._prompts[slot] = k.shape[1]
        self._too_far.discard(slot)
        self._cache.fill(layer, slot, k, v)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        return self._cache.attend(layer, q, k, v, slots)

    def release(self, slot: int) -> None:
        self._cache.release(slot)

    def retract(self, slot: int) -> None:
        self._too_far.add(slot)

    def report(self, slot: int) -> dict[str, Any]:
        if not self._offload:
            return {}
        prompt, held = self._prompts[slot], int(self._cache.lengths[0, slot]) - (slot in self._too_far)
        read = (prompt + held - 1) * (held - prompt) // 2  # by all steps: prompt, prompt + 1, .. held - 1 tokens
        return {"fetched_bytes": read * self._token_nbytes}
