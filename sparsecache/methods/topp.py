"""Top-p: as many tokens as make a share p of the attention, by true scores (Twilight, NeurIPS'25, arXiv 2502.02770).

A token is selected if the tokens of higher probability sum to less than p, so the count follows how concentrated the
attention is. The budget is an upper bound.

GQA: a KV head selects the tokens that any of its query heads selects. If the budget is lower, it selects those of
highest probability in any of its query heads.

Differences: the paper prunes what another method selected, with a budget of a quarter of the tokens, by 4-bit keys.
Here all keys are read, so the selection saves nothing: it shows what an adaptive count attains. p is a share of the
attention to past tokens. The current token does not count and is always attended to. The default p is the authors'.
"""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from sparsecache.cache.selection import SelectionCache, SelectionMethod
from sparsecache.cache.storage import FullStorage
from sparsecache.kernels.scores import scaled_scores
from sparsecache.kernels.speculation import speculated_scores
from sparsecache.kernels.threshold import Scores, Selection
from sparsecache.kernels.top_p import top_p_scores


@dataclass
class TopP(SelectionMethod):
    """Selects as many tokens as make a share of the attention."""

    prompt_queries = 0

    p: Annotated[float, "share of the attention to past tokens that the selected ones must reach, above 0 to 1"] = 0.85

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise ValueError(f"p={self.p} must be above 0 and at most 1.")

    def select(self, q: Tensor, cache: SelectionCache, slots: Tensor) -> Selection:
        kv = cache.full.kv
        if isinstance(kv, FullStorage):
            scores = speculated_scores(q, None, kv.keys, cache.seq_lens, slots)
        else:
            keys = cache.keys_of(slots)
            dequantised = scaled_scores(q, keys, keys.shape[3])
            scores = Scores(dequantised.view(*keys.shape[:2], -1, keys.shape[2]), None)
        return cache.select_near_best(top_p_scores(scores, cache.seq_lens, slots, self.p), slots)
