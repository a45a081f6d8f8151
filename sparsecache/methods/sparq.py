"""SparQ Attention: Bandwidth-Efficient LLM Inference (ICML'24, arXiv 2312.04985).

The `channels` channels in which the query is largest score all past tokens; the softmax divides by
sqrt(D * |q| of these channels / |q| of all), |q| the sum of absolute values. The most recent tokens and those of
highest score make the budget. Attention over these is weighted by their share of the approximate attention; the mean
value of all tokens gets the rest. The defaults are those of the authors' long-context runs.

GQA: as in the paper, a KV head adds the absolute values of its query heads to choose channels, and their approximate
attention to choose tokens.

Differences: the current token is attended to on top of the budget. Keys are kept twice, as in the paper, once per token
and once per channel, so that a step reads the chosen channels alone: a token takes half as much memory again.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig, Shape
from sparsecache.cache.partial_keys import channel_count, check_channels
from sparsecache.cache.selection import SelectionCache, SelectionMethod
from sparsecache.kernels.channel_scores import channel_scores
from sparsecache.kernels.rows import mask_of_first
from sparsecache.kernels.threshold import Selection

_TINY = 1e-30
_ALIGNMENT = 16  # tokens: so that reads of many tokens at once are aligned
_ALWAYS = 100.0  # above the logarithm of any sum of probabilities


@dataclass
class SparQ(SelectionMethod):
    """Scores tokens by the largest channels of the query, and corrects the output by the mean value."""

    channels: Annotated[float, "channels that score tokens: a share of them up to 1, else a count"] = 0.25
    recent: Annotated[float, "share of the budget that the most recent tokens get, 0 to 1"] = 0.25
    mean_value: Annotated[bool, "whether the mean value stands for the tokens that are not selected"] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_channels(self.channels)
        if not 0 <= self.recent <= 1:
            raise ValueError(f"recent={self.recent} must be a share of the budget, 0 to 1.")

    def check(self, shape: Shape) -> None:
        super().check(shape)
        check_channels(self.channels, shape.head_dim)

    def make_sparse_cache(self, layer: int, config: CacheConfig) -> "SparQCache":
        return SparQCache(self, layer, config)

    def select(self, q: Tensor, cache: SelectionCache, slots: Tensor) -> Selection:
        """As SelectionMethod.select; also leaves the selected tokens' share of the attention in `cache.share`."""
        assert isinstance(cache, SparQCache)
        attention = cache.log_attention(q, slots)  # [B, G, H / G, T + 1]
        past = cache.seq_lens[slots]
        budget = torch.minimum(cache.budgets[past], past)
        recent = (self.recent * budget.double()).long()
        position = torch.arange(attention.shape[3], device=q.device)
        is_recent = (position >= (past - recent)[:, None])[:, None]
        selection = cache.select_topk(attention.logsumexp(2).masked_fill(is_recent, _ALWAYS), slots)
        cache.share = _share(attention.exp(), selection, past)
        return selection

    def selection_nbytes(self, config: CacheConfig, seq_len: float) -> float:
        head_dim = config.shape.head_dim
        return seq_len * config.token_nbytes / 2 * channel_count(self.channels, head_dim) / head_dim


class SparQCache(SelectionCache):
    """All keys and values, the keys once more by channel, and the sum of the values.

    keys_by_channel: [slots, G, D, T], T rounded up; value_sums: [slots, G, D] float32; share: [B, G, H / G, 1] float32,
    of the approximate attention of the latest step, what the selected tokens and the current one got.
    """

    share: Tensor

    def __init__(self, method: SparQ, layer: int, config: CacheConfig) -> None:
        super().__init__(method, layer, config)
        self.estimates_rest = method.mean_value
        self._channels = channel_count(method.channels, config.shape.head_dim)
        rows = -(-config.max_tokens // _ALIGNMENT) * _ALIGNMENT
        self.keys_by_channel = config.zeros(config.shape.head_dim, rows)
        self.value_sums = config.zeros(config.shape.head_dim, dtype=torch.float32)

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        super().prefill(slot, q, k, v)
        self.keys_by_channel[slot, :, :, : k.shape[1]] = k.mT
        self.value_sums[slot] = v.sum(1, dtype=torch.float32)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        past = self.seq_lens[slots]
        row = past.clamp(max=self.config.max_tokens - 1)
        self.keys_by_channel[slots, :, :, row] = k[:, :, 0]  # first: the approximate attention includes this token
        self.value_sums.index_add_(0, slots, v[:, :, 0].float())
        out = super().attend(q, k, v, slots)
        if not self.estimates_rest:
            return out
        mean = (self.value_sums[slots] / (past + 1)[:, None, None])[:, :, None]  # [B, G, 1, D]
        grouped = out.view(*mean.shape[:2], -1, out.shape[3])
        return mean.lerp(grouped.float(), self.share).to(out.dtype).view_as(out)

    def log_attention(self, q: Tensor, slots: Tensor) -> Tensor:
        """Return the logarithm of the approximate attention of q to past tokens and the current one.

        [B, G, H / G, T + 1] float32, T as `width`; -inf after the current token.
        """
        grouped = q.view(len(slots), self.config.shape.kv_heads, -1, q.shape[3])
        magnitude = grouped.float().abs()
        chosen = magnitude.sum(2).topk(self._channels, dim=-1).indices  # [B, G, channels]
        of_heads = chosen[:, :, None].expand(-1, -1, grouped.shape[2], -1)
        coverage = magnitude.gather(3, of_heads).sum(3) / magnitude.sum(3).clamp(min=_TINY)
        scale = (coverage * q.shape[3]).clamp(min=_TINY).sqrt()  # a query of zeros scores nothing
        width = min(self.width(slots) + 1, self.config.max_tokens)
        scores = channel_scores(grouped, chosen, scale, self.keys_by_channel, self.seq_lens, slots, width)
        return scores.log_softmax(3)


def _share(attention: Tensor, selection: Selection, past: Tensor) -> Tensor:
    """Return what the selected tokens and the current one get of attention [B, G, H / G, T + 1]: [B, G, H / G, 1]."""
    positions, counts = selection
    is_selected = mask_of_first(counts, positions.shape[2])
    index = positions.masked_fill(~is_selected, 0)[:, :, None].expand(-1, -1, attention.shape[2], -1)
    current = past.clamp(max=attention.shape[3] - 1)[:, None, None, None].expand(*attention.shape[:3], 1)
    of_past = attention.gather(3, index).masked_fill(~is_selected[:, :, None], 0).sum(3, keepdim=True)
    return of_past + attention.gather(3, current)
