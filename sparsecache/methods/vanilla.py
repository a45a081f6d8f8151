"""Vanilla: the full cache, every past token attended to. The baseline of all comparisons."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from sparsecache.cache.base import CacheConfig, CacheMethod
from sparsecache.cache.full import FullCache
from sparsecache.cache.host import check_host_memory
from sparsecache.cache.stats import SequenceStats


@dataclass
class Vanilla(CacheMethod):
    """Keeps and attends to everything."""

    absent_options: ClassVar[Mapping[str, str]] = {"storage": "it is the baseline in full precision. Use kivi."}
    prompt_queries = 0

    offload: Annotated[bool, "keep keys and values in pinned host memory, read whole at every step"] = False

    def make_cache(self, layer: int, config: CacheConfig) -> FullCache:
        self._token_nbytes = config.shape.kv_nbytes(config.dtype)
        if self.offload and layer == 0:
            check_host_memory(config.slots * config.max_tokens * self._token_nbytes)
        return FullCache(config, self.offload)

    def report(self, stats: SequenceStats) -> dict[str, Any]:
        if not self.offload:
            return {}
        past = stats.steps * stats.prompt_tokens + stats.steps * (stats.steps - 1) // 2  # summed over steps
        return {"fetched_bytes": past * self._token_nbytes}
