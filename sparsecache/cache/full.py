"""The full KV cache: one row per position. Vanilla attends to all rows, selection methods to selected rows."""

from typing import ClassVar

from torch import Tensor

from sparsecache.cache.base import CacheConfig, LayerCache, StepBytes
from sparsecache.cache.storage import FullStorage, KVStorage
from sparsecache.kernels.page_selection import PageSelection
from sparsecache.kernels.threshold import Selection


class FullCache(LayerCache):
    """Keeps and attends to every past token. kv: where keys and values are stored, `max_tokens` rows."""

    sparse: ClassVar[bool] = False

    def __init__(self, config: CacheConfig, offload: bool = False, kv: KVStorage | None = None) -> None:
        """offload: keep keys and values in pinned host memory. kv: a storage instead of one in full precision."""
        self.kv = FullStorage(config, config.max_tokens, offload) if kv is None else kv
        self.seq_lens = config.seq_lens
        self._offload = offload

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.kv.store(slot, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        return self.kv.attend(q, k, v, self.seq_lens, slots)

    def attend_selected(
        self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, selection: Selection | PageSelection
    ) -> Tensor:
        """As `attend`, but only over the current token and the selected ones, as `KVStorage.attend_selected`."""
        return self.kv.attend_selected(q, k, v, self.seq_lens, slots, selection)

    def keys_of(self, slots: Tensor, rows: Tensor | int) -> Tensor:
        """Return keys as stored, read-only: [B, G, N, D]. rows: [B, G, N], or N, which stands for the first N."""
        return self.kv.keys_of(self.seq_lens, slots, rows)

    def step_nbytes(self, seq_len: float, attended: float, cache_hit: float = 0.0) -> StepBytes:
        read = self.kv.read_nbytes(seq_len)
        return StepBytes(0.0, read) if self._offload else StepBytes(read)
