"""Select the tokens of highest score within a budget, at fixed sizes."""

import math

import torch
from torch import Tensor

from sparsecache.kernels._triton import use_kernel
from sparsecache.kernels.threshold import Scores, Selection, SelectionParams, threshold_select

_SPLIT_TOKENS = 2048  # tokens that a program of the threshold kernel counts
_ALIGNMENT = 16


def select_topk(
    scores: Tensor, seq_lens: Tensor, slots: Tensor, budgets: Tensor, max_budget: int, within: float = math.inf
) -> Selection:
    """Return the positions of highest score per slot and KV head, as many as `budgets` allows.

    scores: [B, G, T] float32, undefined beyond a slot's past tokens. seq_lens: [slots] int64; slots: [B] int64;
    budgets: [max_tokens + 1] int64; max_budget: the highest of them. within: how far below the best
    score a selected token's may be, exclusive. Ties go to the lower position.
    """
    params = SelectionParams(within, budgets, mean=False)
    width = min(max_budget, scores.shape[2])
    extremes = None
    if use_kernel(scores):
        scores, extremes = _aligned(scores, seq_lens[slots])
    return threshold_select(Scores(scores[:, :, None], extremes), seq_lens, slots, params, width)


def _aligned(scores: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores [B, G, T'], T' a multiple of 16, and their extremes [2, B, G, splits] as the kernel takes them."""
    tokens = scores.shape[2]
    is_past = (torch.arange(tokens, device=past.device) < past[:, None])[:, None]
    highest = scores.masked_fill(~is_past, -torch.inf).amax(2)
    lowest = scores.masked_fill(~is_past, torch.inf).amin(2)
    splits = max(1, min(64, tokens // _SPLIT_TOKENS))
    extremes = torch.stack((highest, lowest))[..., None].expand(-1, -1, -1, splits).contiguous()
    padded = torch.nn.functional.pad(scores, (0, -tokens % _ALIGNMENT))
    return padded.contiguous(), extremes
