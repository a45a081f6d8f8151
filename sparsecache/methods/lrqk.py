"""LRQK: Efficient Low Rank Attention for Long-Context Inference in LLMs (NeurIPS'25, arXiv 2510.23649).

Alternating least squares factorises the prompt's queries and keys together: Q = A_Q B_Q and K = A_K B_K of rank `rank`,
such that A_Q A_K^T is near Q K^T too. At a step, the rows a_q and a_k of the current token minimise

    |q - a_q B_Q|^2 + |k - a_k B_K|^2 + |q k^T - a_q a_k^T|^2 + |q K'^T - a_q A'^T|^2,

where K' and A' are the keys and reduced keys of the tokens attended to in the previous step. The reduced query a_q and
the reduced keys A_K select tokens. The most recent tokens are always selected. Then the bases take one step of steepest
descent. Rank and iterations are the authors' for LongBench.

GQA: the authors repeat keys, and factorise and select per query head. Here a KV head has one factorisation, of its keys
and of the queries of all its heads. It selects the tokens of largest score margin, as `oracle`, by reduced scores.

Differences:

- Every token stays on the device, so what is measured is the selection. The paper keeps tokens in host memory, and
  those attended to on the GPU.
- Factors start from the channels with the highest |q| + |k|, one of the starts in the authors' code, not from random
  numbers. The number of iterations is fixed.
- A prompt has at most half as many factors as tokens. The authors attend to everything until there are as many tokens
  as factors.
- Recent tokens are a share of the budget, near the authors' 64 next to 1,024 others.

A_Q = Q W_Q and A_K = K W_K throughout, so the prompt's factorisation reads only Q^T Q and K^T K.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig, Shape, StepBytes
from sparsecache.cache.checks import check_budget_shares
from sparsecache.cache.selection import SelectionCache, SelectionMethod
from sparsecache.cache.storage import FullStorage, stored_token_nbytes
from sparsecache.kernels.factors import reduce_token, sum_products, update_bases
from sparsecache.kernels.least_squares import factorise
from sparsecache.kernels.moments import token_moments
from sparsecache.kernels.rows import mask_of_first, take_rows
from sparsecache.kernels.speculation import speculated_scores
from sparsecache.kernels.threshold import Selection

_MAX_ITERATIONS = 16
_RANK = 16  # the default; a model whose heads have fewer channels takes as many


@dataclass
class LRQK(SelectionMethod):
    """Selects tokens by low-rank factors of queries and keys, which each step updates."""

    rank: Annotated[int, "rank of the factors, 1 to the channels of a head"] = _RANK
    recent: Annotated[float, "share of the budget that the most recent tokens get, 0 to 1"] = 1 / 16
    iterations: Annotated[int, "iterations of alternating least squares, per prompt and per step, 1 to 16"] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be 1 or more.")
        if not 1 <= self.iterations <= _MAX_ITERATIONS:
            raise ValueError(f"iterations={self.iterations} must be 1 to {_MAX_ITERATIONS}.")
        check_budget_shares(recent=self.recent)

    def check(self, shape: Shape) -> None:
        super().check(shape)
        if self.rank > max(shape.head_dim, _RANK):
            channels = f"{shape.head_dim}, the channels of a head of this model"
            raise ValueError(f"rank={self.rank} must be at most {channels}.")

    def make_sparse_cache(self, layer: int, config: CacheConfig) -> "LRQKCache":
        return LRQKCache(self, layer, config)

    def select(self, q: Tensor, cache: SelectionCache, slots: Tensor) -> Selection:
        """As SelectionMethod.select; also leaves the selection in `cache.selection`."""
        assert isinstance(cache, LRQKCache)
        scores = speculated_scores(cache.reduced_query, None, cache.reduced_keys, cache.seq_lens, slots)
        cache.selection = cache.select_near_best(scores, slots)
        return cache.selection

    def selection_nbytes(self, config: CacheConfig, seq_len: float) -> float:
        head_dim = config.shape.head_dim
        return seq_len * config.token_nbytes / 2 * min(self.rank, head_dim) / head_dim


class LRQKCache(SelectionCache):
    """All keys and values, the reduced keys, the bases, and the products of the tokens attended to in the last step.

    reduced_keys: [slots, G, T, R], A_K. query_basis, key_basis: [slots, G, R, D] float32, B_Q and B_K. products:
    [slots, G, D, R] float32, K^T A_K of the last step's tokens; gram: [slots, G, R, R] float32, their A_K^T A_K; after
    a prompt, those of the tokens that its last query selects. reduced_query: [B, H, 1, R] float32, and selection: of
    the current step.
    """

    method: LRQK
    reduced_query: Tensor
    selection: Selection

    def __init__(self, method: LRQK, layer: int, config: CacheConfig) -> None:
        super().__init__(method, layer, config)
        head_dim = config.shape.head_dim
        rank = min(method.rank, head_dim)
        self._budget = method.layer_budget(layer, config.shape)
        self.reduced_keys = config.zeros(config.max_tokens, rank)
        self._bases = torch.stack([config.zeros(rank, head_dim, dtype=torch.float32)] * 2)
        self.query_basis, self.key_basis = self._bases
        self._unit_vectors = torch.eye(head_dim, device=config.device)
        self.products = config.zeros(head_dim, rank, dtype=torch.float32)
        self.gram = config.zeros(rank, rank, dtype=torch.float32)
        attended = torch.minimum(self.budgets, torch.arange(len(self.budgets), device=self.budgets.device))
        self._params = self._params._replace(recent=(method.recent * attended.double()).long())

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        super().prefill(slot, q, k, v)
        (kv_heads, length, head_dim), rank = k.shape, self.gram.shape[2]
        query_sums, query_gram = token_moments(q, absolute=True, groups=kv_heads)
        key_sums, key_gram = token_moments(k, absolute=True)
        magnitude = torch.add(key_sums, query_sums, alpha=kv_heads / len(q))
        start = self._unit_vectors[magnitude.topk(rank, dim=1).indices]  # [G, R, D]
        if length // 2 < rank:
            start[:, max(1, length // 2) :].fill_(0)  # at most half as many factors as tokens
        factors = factorise(query_gram, key_gram, start, self.method.iterations)
        (query_weight, key_weight), bases = factors[:2], factors[2:]
        self._bases[:, slot] = bases
        reduced = k.float() @ key_weight.mT  # [G, L, R]
        self.reduced_keys[slot, :, :length] = reduced
        reduced_query = q[:, -1].float().view(kv_heads, -1, head_dim) @ query_weight.mT
        self._init_products(slot, reduced_query, k, reduced)

    def _init_products(self, slot: int, reduced_query: Tensor, k: Tensor, reduced: Tensor) -> None:
        """Set a slot's products to those of the prompt tokens that a reduced query [G, H / G, R] selects.

        k: [G, L, D]; reduced: [G, L, R] float32, the reduced keys.
        """
        length = k.shape[1]
        count = min(self._budget.tokens(length), length)
        scores = reduced_query @ reduced.mT  # [G, H / G, L]
        margin = (scores - scores.amax(2, keepdim=True)).amax(1)
        margin[:, length - int(self.method.recent * count) :].fill_(torch.inf)
        selected = margin.topk(count, dim=1, sorted=False).indices[..., None]
        keys, reduced = (x.gather(1, selected.expand(-1, -1, x.shape[2])).float() for x in (k, reduced))
        torch.bmm(keys.mT, reduced, out=self.products[slot])
        torch.bmm(reduced.mT, reduced, out=self.gram[slot])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        self.reduced_query, reduced_key = reduce_token(
            q, k, self.query_basis, self.key_basis, self.products, self.gram, self.reduced_keys, self.seq_lens, slots,
            self.method.iterations,
        )  # fmt: skip
        out = super().attend(q, k, v, slots)
        with self.config.deferred.reading(q, k, self.reduced_query, reduced_key, slots, *self.selection):
            update_bases(q, k, self.reduced_query, reduced_key, self.query_basis, self.key_basis, slots)
            self._update_products(k, reduced_key, slots)
        return out

    def step_nbytes(self, seq_len: float, attended: float, cache_hit: float = 0.0) -> StepBytes:
        """As LayerCache.step_nbytes. The products read the keys and reduced keys of the attended tokens once more."""
        read_again = stored_token_nbytes(self.method.storage, self.config) / 2 * attended
        read_again += self.method.selection_nbytes(self.config, attended)
        return StepBytes(super().step_nbytes(seq_len, attended, cache_hit).device + read_again)

    def _update_products(self, k: Tensor, reduced_key: Tensor, slots: Tensor) -> None:
        """Set the products to those of the tokens of the current step."""
        (positions, counts), kv = self.selection, self.full.kv
        sums = self.products, self.gram
        if isinstance(kv, FullStorage):
            sum_products(k, reduced_key, kv.keys, self.reduced_keys, slots, slots, positions, counts, *sums)
            return
        rows = positions.masked_fill(~mask_of_first(counts, positions.shape[2]), 0)
        keys, reduced_keys = self.full.keys_of(slots, rows), take_rows(self.reduced_keys, slots, rows)
        in_order = torch.arange(rows.shape[2], device=k.device).expand_as(rows)
        batch = torch.arange(len(slots), device=k.device)
        sum_products(k, reduced_key, keys, reduced_keys, batch, slots, in_order, counts, *sums)
