"""SparQ Attention: Bandwidth-Efficient LLM Inference (ICML'24, arXiv 2312.04985).

The `channels` channels in which the query is largest score all past tokens; the softmax divides by
sqrt(D * |q| of these channels / |q| of all), |q| the sum of absolute values. The most recent tokens and those of
highest score make the budget. Attention over these is weighted by their share of the approximate attention; the mean
value of all tokens gets the rest. The defaults are those of the authors' long-context runs; the budget is this
project's.

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
from sparsecache.cache.checks import check_budget_shares
from sparsecache.cache.partial_keys import channel_count, check_channels
from sparsecache.cache.selection import SelectionCache, SelectionMethod
from sparsecache.kernels.channel_scores import (
    add_mean_value,
    append_and_choose,
    approximate_attention,
    select_by_attention,
)
from sparsecache.kernels.threshold import Selection

_ALIGNMENT = 16  # tokens: so that reads of many tokens at once are aligned


@dataclass
class SparQ(SelectionMethod):
    """Scores tokens by the largest channels of the query, and corrects the output by the mean value."""

    prompt_queries = 0

    channels: Annotated[float, "channels that score tokens: a share of them up to 1, else a count"] = 0.25
    recent: Annotated[float, "share of the budget that the most recent tokens get, 0 to 1"] = 0.25
    mean_value: Annotated[bool, "whether the mean value stands for the tokens that are not selected"] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_channels(self.channels)
        check_budget_shares(recent=self.recent)

    def check(self, shape: Shape) -> None:
        super().check(shape)
        check_channels(self.channels, shape.head_dim)

    def make_sparse_cache(self, layer: int, config: CacheConfig) -> "SparQCache":
        return SparQCache(self, layer, config)

    def select(self, q: Tensor, cache: SelectionCache, slots: Tensor) -> Selection:
        assert isinstance(cache, SparQCache)
        return cache.select_by_channels(q, slots)

    def selection_nbytes(self, config: CacheConfig, seq_len: float) -> float:
        head_dim = config.shape.head_dim
        return seq_len * config.token_nbytes / 2 * channel_count(self.channels, head_dim) / head_dim


class SparQCache(SelectionCache):
    """All keys and values, the keys once more by channel, and the sum of the values.

    keys_by_channel: [slots, G, D, T], T rounded up; value_sums: [slots, G, D] float32; recent: [max_tokens + 1] int64,
    how many of the last past tokens are always selected, by past tokens.
    """

    def __init__(self, method: SparQ, layer: int, config: CacheConfig) -> None:
        super().__init__(method, layer, config)
        self.estimates_rest = method.mean_value
        self._count = channel_count(method.channels, config.shape.head_dim)
        rows = -(-config.max_tokens // _ALIGNMENT) * _ALIGNMENT
        self.keys_by_channel = config.zeros(config.shape.head_dim, rows)
        self.value_sums = config.zeros(config.shape.head_dim, dtype=torch.float32)
        past = torch.arange(len(self.budgets), device=config.device)
        self.recent = (method.recent * torch.minimum(self.budgets, past).double()).long()

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        super().prefill(slot, q, k, v)
        self.keys_by_channel[slot, :, :, : k.shape[1]] = k.mT
        self.value_sums[slot] = v.sum(1, dtype=torch.float32)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        # First, because the approximate attention includes this token.
        keys = self.keys_by_channel
        self._channels = append_and_choose(q, k, v, keys, self.value_sums, self.seq_lens, slots, self._count)
        out = super().attend(q, k, v, slots)
        if self.estimates_rest:
            approximate = (self._attention, self._selection, self.value_sums, self.seq_lens, slots, self.recent)
            out = add_mean_value(out, *approximate)
        del self._channels, self._attention, self._selection  # the next layer may reuse their memory
        return out

    def select_by_channels(self, q: Tensor, slots: Tensor) -> Selection:
        """Return the recent past tokens and those with the most approximate attention."""
        width = min(self.width(slots) + 1, self.config.max_tokens)
        inputs = (self.keys_by_channel, self.seq_lens, slots, self.recent)
        self._attention = approximate_attention(q, self._channels, *inputs, width)
        most = min(self.max_budget, self.config.max_tokens)
        self._selection = select_by_attention(self._attention, self.seq_lens, slots, self.budgets, self.recent, most)
        return self._selection
