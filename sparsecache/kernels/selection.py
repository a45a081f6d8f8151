"""Select past tokens by score, in plain torch.

The margin to the best score gives a count; the tokens with the highest margins are selected. The functions know neither
where scores come from nor what the selected tokens hold.
"""

from typing import Literal

import torch
from torch import Tensor

CountRule = Literal["mean", "per_head"]
GroupRule = Literal["max", "softmax"]


def score_margin(scores: Tensor, kv_heads: int, group: GroupRule = "max") -> Tensor:
    """Return each token's score minus the best score, at most 0: [B, G, T].

    scores: [B, H, T], -inf for tokens that must not be selected. Each query head is compared with its own best score.
    group: how a KV head joins the margins of its query heads. "max": the largest. "softmax": the log of the mean
    probability, which orders tokens as the sum of probabilities does, relative to a token that is the best one of every
    head.
    """
    batch, heads, length = scores.shape
    if length == 0:
        return scores.new_zeros(batch, kv_heads, 0)
    lowest = torch.finfo(scores.dtype).min  # instead of -inf: -inf - -inf would be NaN
    best = scores.amax(-1, keepdim=True).clamp(min=lowest)
    margins = (scores - best).view(batch, kv_heads, heads // kv_heads, length)
    if group == "max":
        return margins.amax(2)
    log_total = margins.logsumexp(3, keepdim=True).clamp(min=lowest)  # a head's best probability is exp(-log_total)
    return (margins - log_total).logsumexp(2) - (-log_total).logsumexp(2)


def mass_count(margin: Tensor, share: float) -> Tensor:
    """Return how many tokens of the highest margins make a share of the sum of exp(margin): [B, G].

    margin: [B, G, T], -inf for tokens that must not be selected. At least one token, unless there is none.
    """
    falling = margin.exp().sort(dim=-1, descending=True).values
    before = falling.cumsum(-1) - falling  # mass of the tokens before each one
    needed = (before < share * falling.sum(-1, keepdim=True)) & (falling > 0)
    return needed.sum(-1)


def force_include(margin: Tensor, positions: Tensor, past: Tensor, sinks: int, recent: int | Tensor) -> Tensor:
    """Set the margin of the first `sinks` and the last `recent` past tokens to inf.

    margin: [B, G, T]; positions: the position of each token, [B, G, T] or broadcastable; past: [B], past tokens per
    sequence; recent: one number, or [B]. Tokens at position `past` and beyond keep their margin.
    """
    if isinstance(recent, int) and not sinks and not recent:
        return margin
    past, first_recent = past[:, None, None], (past - recent)[:, None, None]
    return margin.masked_fill(((positions < sinks) | (positions >= first_recent)) & (positions < past), torch.inf)


def count_within(
    margin: Tensor, alpha: float, budget: Tensor, rule: CountRule, max_count: Tensor | None = None
) -> Tensor:
    """Return how many tokens each KV head selects, [B, G].

    These are the tokens within alpha of the best, at most `budget`. margin: [B, G, T], -inf for tokens that must not be
    selected; budget: [B]; max_count: [B, G], another upper limit. rule "mean": all KV heads select the mean of their
    counts, rounded up (InfiniGen); "per_head": each KV head selects its own count.
    """
    count = (margin > -alpha).sum(-1)
    if max_count is not None:
        count = torch.minimum(count, max_count)
    if rule == "mean":
        count = ((count.sum(1, keepdim=True) + count.shape[1] - 1) // count.shape[1]).expand_as(count)
    return torch.minimum(count, budget[:, None])


def topk_indices(margin: Tensor, count: Tensor) -> Tensor:
    """Return the positions of the `count` highest margins, ascending, then -1: [B, G, N].

    margin: [B, G, T]; count: [B, G]; N is the largest count. The lower position wins a tie. A token at -inf is never
    selected.
    """
    length = margin.shape[-1]
    width = min(int(count.max()), length) if count.numel() else 0
    # One column more receives the tokens that are not selected.
    positions = torch.full((*count.shape, width + 1), -1, dtype=torch.int64, device=margin.device)
    if width:
        last = (count - 1).clamp(0, width - 1)[..., None]
        threshold = margin.topk(width, dim=-1).values.gather(-1, last)
        above = margin > threshold
        equal = (margin == threshold) & (margin > -torch.inf)
        selected = above | (equal & (equal.cumsum(-1) <= count[..., None] - above.sum(-1, keepdim=True)))
        ranks = (selected.cumsum(-1) - 1).masked_fill(~selected, width)
        positions.scatter_(-1, ranks, torch.arange(length, device=margin.device).expand_as(ranks))
    return positions[..., :width]
