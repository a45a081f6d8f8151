"""Which past tokens are near enough to the best: a count from the scores, a cap, and the highest of each KV head.

Knows nothing of where scores come from or what the chosen tokens hold.
"""

from typing import Literal

import torch
from torch import Tensor

Fetch = Literal["mean", "per_head"]


def distance_to_best(scores: Tensor, kv_heads: int) -> Tensor:
    """Scores [B, H, T] (-inf: not to be chosen) to [B, G, T]: how near each token comes to a head's best, at most 0.

    Each head is measured against its own maximum; a KV head takes the nearest of its heads.
    """
    batch, heads, length = scores.shape
    if length == 0:
        return scores.new_zeros(batch, kv_heads, 0)
    best = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)  # no token at all: no nan
    return (scores - best).view(batch, kv_heads, heads // kv_heads, length).amax(2)


def put_first(distance: Tensor, positions: Tensor, past: Tensor, sinks: int, recent: int) -> Tensor:
    """Puts the first `sinks` and the last `recent` of past [B] tokens before all others: at inf.

    distance: [B, G, T]; positions: [B, G, T], or what broadcasts to it, each token's; at `past` and beyond is none.
    """
    if not sinks and not recent:
        return distance
    last = past[:, None, None]
    return distance.masked_fill(((positions < sinks) | (positions >= last - recent)) & (positions < last), torch.inf)


def count_near(distance: Tensor, alpha: float, cap: Tensor, fetch: Fetch) -> Tensor:
    """How many tokens each KV head fetches, [B, G]: those within alpha of the best, `cap` [B] at most.

    distance: [B, G, T], -inf for tokens that cannot be chosen. fetch "mean": the mean over the KV heads, rounded
    up, for all of them (the paper); "per_head": each its own.
    """
    count = (distance > -alpha).sum(-1)
    if fetch == "mean":
        count = ((count.sum(1, keepdim=True) + count.shape[1] - 1) // count.shape[1]).expand_as(count)
    return torch.minimum(count, cap[:, None])


def highest(distance: Tensor, count: Tensor) -> Tensor:
    """The `count` [B, G] highest of distance [B, G, T]: positions [B, G, N] ascending, then -1.

    Ties go to the lower position; a token at -inf is never taken.
    """
    length = distance.shape[-1]
    width = min(int(count.max()), length) if count.numel() else 0
    positions = torch.full((*count.shape, width + 1), -1, dtype=torch.int64, device=distance.device)  # one for the rest
    if width:
        last = (count - 1).clamp(0, width - 1)[..., None]
        lowest = distance.topk(width, dim=-1).values.gather(-1, last)  # of the taken: all above it are, and some equals
        higher = distance > lowest
        equal = (distance == lowest) & (distance > -torch.inf)
        taken = higher | (equal & (equal.cumsum(-1) <= count[..., None] - higher.sum(-1, keepdim=True)))
        ranks = (taken.cumsum(-1) - 1).masked_fill(~taken, width)
        positions.scatter_(-1, ranks, torch.arange(length, device=distance.device).expand_as(ranks))
    return positions[..., :width]


def select(scores: Tensor, kv_heads: int, alpha: float, cap: Tensor, fetch: Fetch) -> Tensor:
    """Positions [B, G, N] of the past tokens to attend to, from scores [B, H, T]; see the three steps above."""
    distance = distance_to_best(scores, kv_heads)
    return highest(distance, count_near(distance, alpha, cap, fetch))
