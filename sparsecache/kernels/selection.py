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
    width = int(count.max()) if count.numel() else 0
    order = distance.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(width, device=distance.device)
    taken = (ranks < count[..., None]) & (order.values[..., :width] > -torch.inf)
    positions = order.indices[..., :width].masked_fill(~taken, distance.shape[-1]).sort(-1).values
    return positions.masked_fill(positions == distance.shape[-1], -1)


def select(scores: Tensor, kv_heads: int, alpha: float, cap: Tensor, fetch: Fetch) -> Tensor:
    """Positions [B, G, N] of the past tokens to attend to, from scores [B, H, T]; see the three steps above."""
    distance = distance_to_best(scores, kv_heads)
    return highest(distance, count_near(distance, alpha, cap, fetch))
