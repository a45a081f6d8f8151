"""Find the top-p tokens of query heads, so that `threshold_select` selects among them."""

import math

import torch
from torch import Tensor

from sparsecache.kernels._triton import saturating_programs, use_kernel
from sparsecache.kernels.threshold import Scores
from sparsecache.kernels.top_p_tokens import find_top_p

_MAX_SPLITS = 64


def top_p_scores(scores: Scores, seq_lens: Tensor, slots: Tensor, p: float) -> Scores:
    """Return scores by which a KV head selects the top-p tokens of its query heads alone.

    A query head's top-p tokens are the fewest past tokens of highest probability that make the share p of its attention
    to past tokens; of tokens with equal probability, the earlier come first. A KV head takes the highest probability of
    its query heads.

    scores: of query heads, values [B, G, H / G, T], extremes or None; seq_lens: [slots] int64, past tokens, at most T;
    slots: [B] int64; p: above 0, at most 1. With kernels `threshold_select` joins the query heads, so values stay
    [B, G, H / G, T]. The reference returns one head per KV head, values [B, G, 1, T] float32: the log probabilities of
    the top-p tokens, else -inf.
    """
    values = scores.values
    if not use_kernel(values):
        is_past = _is_past(values, seq_lens, slots)
        log_probs = values.float().masked_fill(~is_past, -math.inf).log_softmax(3)
        log_probs = log_probs.masked_fill(log_probs.isnan(), -math.inf)  # a slot without past tokens gives NaN
        falling, order = log_probs.sort(dim=3, descending=True, stable=True)
        probs = falling.exp()
        is_top_p = probs.cumsum(3) - probs < (p if p < 1 else math.inf)  # the sum of all may round to more than 1
        is_top_p = torch.zeros_like(is_past.expand_as(log_probs)).scatter_(3, order, is_top_p)
        return Scores(log_probs.masked_fill(~is_top_p, -math.inf).amax(2, keepdim=True), None)
    values = values.contiguous()
    extremes = _extremes(values, seq_lens, slots) if scores.extremes is None else scores.extremes
    return Scores(values, extremes, find_top_p(values.flatten(1, 2), extremes, seq_lens, slots, p))


def _is_past(values: Tensor, seq_lens: Tensor, slots: Tensor) -> Tensor:
    """Return which tokens of values [B, G, H / G, T] are past tokens: [B, 1, 1, T] bool."""
    return torch.arange(values.shape[3], device=values.device) < seq_lens[slots][:, None, None, None]


def _extremes(values: Tensor, seq_lens: Tensor, slots: Tensor) -> Tensor:
    """Return the highest and lowest score of past tokens per query head: [2, B, H, splits] float32.

    All splits of a head have its extremes. There are as many as fill the GPU, since each is selected from by a program.
    """
    batch, kv_heads = values.shape[:2]
    splits = max(1, min(_MAX_SPLITS, saturating_programs(values.device) // (batch * kv_heads)))
    is_past = _is_past(values, seq_lens, slots)
    highest = values.masked_fill(~is_past, -math.inf).amax(3)
    lowest = values.masked_fill(~is_past, math.inf).amin(3)
    extremes = torch.stack((highest, lowest)).flatten(2)[..., None].float()
    return extremes.expand(-1, -1, -1, splits).contiguous()
