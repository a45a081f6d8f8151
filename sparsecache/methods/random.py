"""Random: past tokens drawn at random at each step, a lower bound for selection methods.

A position's draw depends on the position and the sequence's length alone, so that a text can be reproduced.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig
from sparsecache.cache.selection import SelectionCache, SelectionMethod
from sparsecache.kernels.threshold import Selection

_SPREAD_32, _SPREAD_16 = 2654435761, 40503  # near 2^32 and 2^16 over the golden ratio: multiples are spread evenly
_MIX = 0x45D9F3B  # the multiplier of a 32-bit finaliser, https://stackoverflow.com/a/12996028


@dataclass
class Random(SelectionMethod):
    """Selects past tokens at random."""

    prompt_queries = 0

    seed: Annotated[int, "seed of the random numbers"] = 0

    def select(self, q: Tensor, cache: SelectionCache, slots: Tensor) -> Selection:
        return cache.select_topk(self._draw(cache, slots), slots)

    def _draw(self, cache: SelectionCache, slots: Tensor) -> Tensor:
        """Return [B, G, T] float32 from 0 to 1 by a hash of seed, length, KV head and position."""
        kv_heads, past = cache.config.shape.kv_heads, cache.seq_lens[slots]
        position = torch.arange(cache.width(slots), device=slots.device)
        head = torch.arange(kv_heads, device=slots.device)[:, None]
        mixed = position + _SPREAD_32 * (past[:, None, None] * kv_heads + head + 1) + _SPREAD_16 * self.seed
        for _ in range(2):
            mixed = ((mixed >> 16) ^ mixed) * _MIX & 0xFFFFFFFF
        return ((mixed >> 16) ^ mixed).float() / 2**32

    def selection_nbytes(self, config: CacheConfig, seq_len: float) -> float:
        return 0.0
