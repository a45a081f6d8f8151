"""Select the tokens of highest score within a budget, at fixed sizes."""

import math

from torch import Tensor

from sparsecache.kernels._triton import use_kernel
from sparsecache.kernels.extremes import with_extremes
from sparsecache.kernels.threshold import Scores, Selection, SelectionParams, threshold_select


def select_topk(scores: Tensor, seq_lens: Tensor, slots: Tensor, budgets: Tensor, max_budget: int) -> Selection:
    """Return the positions of highest score per slot and KV head, as many as `budgets` allows.

    scores: [B, G, T] float32, undefined beyond a slot's past tokens. seq_lens: [slots] int64; slots: [B] int64;
    budgets: [max_tokens + 1] int64, by past tokens; max_budget: the highest of them. The lower position wins a tie.
    """
    params = SelectionParams(math.inf, budgets, mean=False)
    whole = with_extremes(scores, seq_lens, slots) if use_kernel(scores) else Scores(scores[:, :, None], None)
    return threshold_select(whole, seq_lens, slots, params, min(max_budget, scores.shape[2]))
