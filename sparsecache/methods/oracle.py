"""Oracle: the tokens of highest true score, an upper bound for selection methods (InfiniGen without speculation).

It reads every key to select, so it saves nothing. It shows what perfect speculation would select.

GQA: a token's score for a KV head is how near it comes to the best score of one of the head's queries, as in
`infinigen`.
"""

from dataclasses import dataclass

from torch import Tensor

from sparsecache.cache.selection import SelectionCache, SelectionMethod, positions_below
from sparsecache.kernels.scores import scaled_scores
from sparsecache.kernels.selection import score_margin
from sparsecache.kernels.threshold import Selection


@dataclass
class Oracle(SelectionMethod):
    """Selects by the true query and all keys."""

    def select(self, q: Tensor, cache: SelectionCache, slots: Tensor) -> Selection:
        keys = cache.keys_of(slots)
        scores = scaled_scores(q, keys, keys.shape[3])[:, :, 0]  # [B, H, T]
        is_past = positions_below(cache.seq_lens[slots], scores.shape[2])
        margins = score_margin(scores.masked_fill(~is_past, float("-inf")), keys.shape[1])
        return cache.select_topk(margins, slots)
