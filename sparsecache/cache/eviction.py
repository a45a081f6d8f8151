"""Base classes of methods that evict tokens at the end of the prompt, or at every decode step.

They save memory: a cache has capacity for the budget, and for new tokens where these do not count.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig, LayerCache, MethodKind, Shape, StepBytes
from sparsecache.cache.sparse import SparseMethod, StoredMethod
from sparsecache.cache.storage import make_storage
from sparsecache.kernels.attention_sums import attention_sums as attention_sums  # for methods
from sparsecache.kernels.decode import attend_and_append
from sparsecache.kernels.scores import scaled_scores

_PINNED = 1e30  # above any score


class PromptEvictionCache(LayerCache):
    """The kept tokens of the prompt in the first rows, per KV head, followed by all new tokens.

    kv: where they are stored, in the order of the text. num_evicted: [slots, G] int64, the evicted prompt tokens. KV
    heads may keep different counts. Rows are allocated for the highest possible count.
    """

    def __init__(self, method: "EvictionMethod", layer: int, config: CacheConfig) -> None:
        self.method, self.layer, self.config = method, layer, config
        self.budget = method.layer_budget(layer, config.shape)
        kept = method.max_head_tokens(self.budget.most(config.max_tokens), config.shape)
        capacity = min(config.max_tokens, kept + config.max_new_tokens)
        self.kv = make_storage(method.storage, config, capacity)
        self.num_evicted = config.zeros(dtype=torch.int64)
        self.seq_lens, self.stats = config.seq_lens, config.stats

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        length = k.shape[1]
        count = min(self.budget.tokens(length), length)
        width = min(self.method.max_head_tokens(count, self.config.shape), length)
        order, counts = self.method.keep(self.method.score(q, k, v), count)
        is_kept = torch.arange(width, device=k.device) < counts[:, None]
        kept = order[:, :width].masked_fill(~is_kept, length - 1).sort(dim=1).values
        self.kv.store(slot, _rows(k, kept), _rows(v, kept), counts)
        self.num_evicted[slot] = length - counts

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        num_tokens = (self.seq_lens[:, None] - self.num_evicted).clamp(min=0)  # [slots, G]
        with self.config.deferred.reading(num_tokens, slots):
            self.stats.record(num_tokens[slots], slots)
        return self.kv.attend(q, k, v, num_tokens, slots)

    def step_nbytes(self, seq_len: float, attended: float, cache_hit: float = 0.0) -> StepBytes:
        return StepBytes(self.kv.read_nbytes(attended))


@dataclass
class EvictionMethod(StoredMethod):
    """Keeps the prompt tokens of highest score and every new token: a subclass defines `score`.

    Tokens are evicted once, at the end of the prompt. A budget up to 1 is a share of the prompt's length.
    """

    kind: ClassVar[MethodKind] = "eviction"
    budget_excludes_generated: ClassVar[bool] = True

    budget: Annotated[float, "prompt tokens kept, new ones not counted: a share up to 1, else a count"] = 0.2

    def make_sparse_cache(self, layer: int, config: CacheConfig) -> LayerCache:
        return PromptEvictionCache(self, layer, config)

    @abstractmethod
    def score(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return a score per KV head and prompt token: [G, L]. The highest are kept.

        q: [H, L, D]; k, v: [G, L, D], rotated. `pin_last` keeps the last tokens regardless of their score.
        """

    def keep(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return each KV head's positions by descending score [G, L], and how many of them it keeps [G].

        Ties go to the earlier position. KV heads keep `count` tokens each, 1 to L, unless a subclass
        gives them different counts with that mean.
        """
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        return order, torch.full((len(order),), count, device=order.device)

    def max_head_tokens(self, count: int, shape: Shape) -> int:
        """Return the most tokens of a long prompt that one KV head keeps where the mean is `count`."""
        return count


class DecodingEvictionCache(LayerCache):
    """At most `budget` past tokens per KV head: each step appends the new token, then evicts one.

    keys, values: [slots, G, rows, D], unordered, the first num_tokens [slots, G] of them in use; positions: [slots,
    G, rows] int64, of each token; scores: [slots, G, rows] float32, as the subclass defines them. token_state: all
    tensors with a row per token; a subclass may add its own.
    """

    def __init__(self, method: SparseMethod, layer: int, config: CacheConfig) -> None:
        self.config, self.budgets = config, method.budget_table(layer, config)
        capacity = min(int(self.budgets[-1]) + 1, config.max_tokens)
        self.keys, self.values = (config.zeros(capacity, config.shape.head_dim) for _ in range(2))
        self.positions = config.zeros(capacity, dtype=torch.int64)
        self.scores = config.zeros(capacity, dtype=torch.float32)
        self.token_state = [self.keys, self.values, self.positions, self.scores]
        self.num_tokens = config.zeros(dtype=torch.int64)
        self.seq_lens, self.stats = config.seq_lens, config.stats
        self._budget = method.layer_budget(layer, config.shape)
        self._heads = torch.arange(config.shape.kv_heads, device=config.device)
        self._rows = torch.arange(capacity, device=config.device)

    @abstractmethod
    def prompt_scores(self, q: Tensor, k: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the `count` positions of a prompt to keep, [G, count], and their scores, [G, count] float32."""

    @abstractmethod
    def step_scores(self, q: Tensor, slots: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new scores of the rows, and their priorities: [B, G, rows] each. The lowest priority is evicted.

        The rows include the new token. past: [B], the tokens of each sequence with the new one.
        """

    def before_evict(self, slots: Tensor, row: Tensor, last: Tensor, over: Tensor) -> None:
        """Update state before the last row replaces `row`, which is evicted where `over` is True; all [B, G].

        For a subclass whose state of one row depends on other rows. Elsewhere `row` is `last`, and is not evicted.
        """

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        length = k.shape[1]
        count = min(self._budget.tokens(length), length)
        kept, scores = self.prompt_scores(q, k, count)
        self.keys[slot, :, :count], self.values[slot, :, :count] = _rows(k, kept), _rows(v, kept)
        self.positions[slot, :, :count], self.scores[slot, :, :count] = kept, scores
        self.num_tokens[slot].fill_(count)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        out = attend_and_append(q, k, v, self.keys, self.values, self.num_tokens, slots)
        with self.config.deferred.reading(q, slots):
            past = self.seq_lens[slots].clamp(max=self.config.max_tokens - 1)
            self._evict(q, slots, self._begin_token(slots, past), past + 1)
        return out

    def _begin_token(self, slots: Tensor, past: Tensor) -> Tensor:
        """Begin the state of the new token, at position past [B]; return the rows in use with it, [B, G]."""
        held = self.num_tokens[slots]
        self.stats.record(held, slots)
        new_row = held.clamp(max=len(self._rows) - 1)
        index = slots[:, None], self._heads, new_row
        self.positions[index] = past[:, None].expand_as(held)
        self.scores[index] = torch.zeros_like(held, dtype=torch.float32)  # assigning a number would copy from the host
        return new_row + 1

    def _evict(self, q: Tensor, slots: Tensor, held: Tensor, past: Tensor) -> None:
        """Evict the row of lowest priority where held [B, G] exceeds the budget; the last row replaces it."""
        scores, priorities = self.step_scores(q, slots, past)
        self.scores[slots] = scores
        positions = self.positions[slots]
        priorities = priorities.masked_fill(self._rows >= held[..., None], torch.inf)
        is_lowest = priorities == priorities.amin(2, keepdim=True)
        victim = positions.masked_fill(~is_lowest, torch.iinfo(torch.int64).max).argmin(2)  # ties go to the earliest
        over = held > self.budgets[past][:, None]
        last = held - 1
        target = torch.where(over, victim, last)  # elsewhere the last row replaces itself
        self.before_evict(slots, target, last, over)
        to, of = (slots[:, None], self._heads, target), (slots[:, None], self._heads, last)
        for rows in self.token_state:
            rows[to] = rows[of]
        self.num_tokens[slots] = torch.where(over, last, held)

    def step_nbytes(self, seq_len: float, attended: float, cache_hit: float = 0.0) -> StepBytes:
        return StepBytes(attended * self.config.token_nbytes)

    def free_slot(self, slot: int) -> None:
        self.num_tokens[slot].zero_()

    def probabilities(self, q: Tensor, slots: Tensor) -> Tensor:
        """Return the attention of q [B, H, 1, D] to each row, summed over a KV head's queries: [B, G, rows] float32."""
        keys = self.keys[slots]
        is_free = self._rows > self.num_tokens[slots][..., None]  # the new token is in row num_tokens
        scores = scaled_scores(q, keys, keys.shape[3]).view(*keys.shape[:2], -1, keys.shape[2])  # [B, G, H / G, rows]
        return scores.masked_fill(is_free[:, :, None], -torch.inf).softmax(-1).sum(2)


def check_voting(window: int, kernel: int) -> None:
    """Raise ValueError unless `window` last tokens can vote and votes can be pooled over `kernel` positions."""
    if window < 1:
        raise ValueError(f"window={window} must be 1 token or more.")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel={kernel} must be an odd number of positions, 1 or more.")


def pin_last(scores: Tensor, count: int) -> Tensor:
    """Return scores [G, L] with the last `count` tokens above all others, the last one highest."""
    count = min(count, scores.shape[1])
    if not count:
        return scores
    rising = _PINNED * (1 + torch.arange(count, device=scores.device) / count)
    return torch.cat((scores[:, :-count], rising.expand(len(scores), -1)), 1)


def _rows(x: Tensor, kept: Tensor) -> Tensor:
    """Return the tokens kept [G, N] of x [G, L, D]: [G, N, D]."""
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
