"""The full KV cache: one row per position. Vanilla attends to all rows, selection methods to selected rows."""

from typing import ClassVar

from torch import Tensor

from sparsecache.cache.base import CacheConfig, LayerCache, StepBytes
from sparsecache.cache.host import allocate, copy_into
from sparsecache.kernels.decode import append_kv, attend_and_append, attend_selected


class FullCache(LayerCache):
    """Keeps and attends to every past token.

    keys, values: [slots, G, T, D], T = max_tokens, on the device or, with `offload`, in pinned host memory.
    """

    sparse: ClassVar[bool] = False

    def __init__(self, config: CacheConfig, offload: bool = False) -> None:
        size = (config.slots, config.shape.kv_heads, config.max_tokens, config.shape.head_dim)
        self.keys, self.values = (allocate(size, config.dtype, config.device, offload) for _ in range(2))
        self.seq_lens = config.seq_lens
        self._offload, self._token_nbytes = offload, config.token_nbytes

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        copy_into(self.keys[slot], k)
        copy_into(self.values[slot], v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        return attend_and_append(q, k, v, self.keys, self.values, self.seq_lens, slots)

    def attend_selected(
        self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor, counts: Tensor
    ) -> Tensor:
        """As `attend`, but only over the new token and the first counts [B, G] of positions [B, G, N]."""
        out = attend_selected(q, k, v, self.keys, self.values, slots, positions, counts)
        append_kv(k, v, self.keys, self.values, self.seq_lens, slots)
        return out

    def step_nbytes(self, seq_len: float, attended: float, cache_hit: float = 0.0) -> StepBytes:
        read = seq_len * self._token_nbytes
        return StepBytes(0.0, read) if self._offload else StepBytes(read)
