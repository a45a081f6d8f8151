"""The interface between the engine and cache methods, and base classes for eviction and selection methods.

Nothing here depends on weights. The names below are what most new methods need.
"""

from sparsecache.cache.base import CacheConfig, CacheMethod, LayerCache, ProjectQuery, Shape, StepBytes
from sparsecache.cache.eviction import (
    AttentionEvictionCache,
    DecodingEvictionCache,
    EvictionMethod,
    PromptEvictionCache,
    attention_sums,
    check_voting,
    pin_last,
)
from sparsecache.cache.full import FullCache
from sparsecache.cache.selection import SelectionCache, SelectionMethod, group_max, positions_below
from sparsecache.cache.sparse import SparseMethod
from sparsecache.cache.stats import SequenceStats
from sparsecache.kernels.threshold import Selection

__all__ = [
    "AttentionEvictionCache",
    "CacheConfig",
    "CacheMethod",
    "DecodingEvictionCache",
    "EvictionMethod",
    "FullCache",
    "LayerCache",
    "ProjectQuery",
    "PromptEvictionCache",
    "Selection",
    "SelectionCache",
    "SelectionMethod",
    "SequenceStats",
    "Shape",
    "SparseMethod",
    "StepBytes",
    "attention_sums",
    "check_voting",
    "group_max",
    "pin_last",
    "positions_below",
]
