"""Oracle: the tokens of highest true score, an upper bound for selection methods (InfiniGen without speculation).

It reads every key to select, so it saves nothing. It shows what perfect speculation would select.

GQA: a KV head selects the tokens of largest score margin. A token's score margin is its score minus the best score of
the same query head; a KV head takes the largest over its query heads. `infinigen` with `group=max` does the same.
"""

from dataclasses import dataclass

from torch import Tensor

from sparsecache.cache.selection import SelectionCache, SelectionMethod
from sparsecache.kernels.threshold import Selection


@dataclass
class Oracle(SelectionMethod):
    """Selects by the true query and all keys."""

    prompt_queries = 0

    def select(self, q: Tensor, cache: SelectionCache, slots: Tensor) -> Selection:
        return cache.select_by_keys(q, slots)
