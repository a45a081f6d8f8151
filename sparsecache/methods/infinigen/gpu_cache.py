"""The most recently fetched tokens of an offloaded layer, kept on the GPU: only new selections cross the link.

The least recently used tokens are evicted first. The cache does not change what is attended to.
"""

import torch

from sparsecache.cache.base import CacheConfig
from sparsecache.kernels.lru_cache import LRUCache


def make_gpu_cache(tokens: int, config: CacheConfig) -> LRUCache:
    """Return an empty cache of `tokens` rows, 1 or more, per slot and KV head."""
    tokens = min(tokens, config.max_tokens)
    cache = LRUCache(
        rows=config.zeros(tokens, 2, config.shape.head_dim),
        row_of_token=config.zeros(config.max_tokens, dtype=torch.int32),
        token_of_row=config.zeros(tokens, dtype=torch.int32),
        lru_order=config.zeros(tokens, dtype=torch.int32),
        hits=torch.zeros(2, config.slots, config.shape.kv_heads, dtype=torch.int64, device=config.device),
    )
    for slot in range(config.slots):
        clear_slot(cache, slot)
    return cache


def clear_slot(cache: LRUCache, slot: int) -> None:
    """Remove a slot's tokens."""
    cache.row_of_token[slot].fill_(-1)
    cache.token_of_row[slot].fill_(-1)
    cache.lru_order[slot] = torch.arange(cache.lru_order.shape[2], dtype=torch.int32, device=cache.lru_order.device)
    cache.hits[:, slot].zero_()
