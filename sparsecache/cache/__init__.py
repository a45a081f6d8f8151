"""What cache methods are made of: the seam to the engine, and base classes for eviction and selection methods.

Knows neither weights nor text. A method of one's own needs no more than the names below.
"""

from sparsecache.cache.base import CacheConfig, CacheMethod, LayerCache, ProjectQuery, Shape, StepBytes
from sparsecache.cache.eviction import (
    DecodingEvictionCache,
    EvictionMethod,
    PromptEvictionCache,
    attention_sums,
    pin_last,
)
from sparsecache.cache.full import FullCache
from sparsecache.cache.selection import SelectionCache, SelectionMethod, group_max, positions_below
from sparsecache.cache.sparse import SparseMethod
from sparsecache.cache.stats import SequenceStats
from sparsecache.kernels.threshold import Selection

__all__ = [
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
    "group_max",
    "pin_last",
    "positions_below",
]
