"""Base classes of methods that evict tokens after prefill, or at every decode step.

They save memory: a cache has capacity for the budget, and for generated tokens where these do not count.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig, LayerCache, MethodKind, Shape, StepBytes
from sparsecache.cache.sparse import SparseMethod, StoredMethod
from sparsecache.cache.storage import make_storage
from sparsecache.kernels.attention_sums import attention_sums as attention_sums  # exported for methods
from sparsecache.kernels.decode import attend_and_append
from sparsecache.kernels.eviction import KeptTokens, evict_least_attended, find_lowest, replace_rows
from sparsecache.kernels.highest import highest_positions

NO_STORAGE: dict[str, str] = {
    "storage": "the current token takes the row of an evicted one, but keys are quantised in groups of neighbours. Use "
    "a method that evicts once, such as snapkv."
}
"""`absent_options` of the methods that evict at each step."""

_PINNED = 1e30  # above any score
_MAX_KERNEL = 1023  # pooling takes time in proportion


class PromptEvictionCache(LayerCache):
    """The kept tokens of the prompt in the first rows, per KV head, followed by all generated ones.

    kv: where they are stored, in the order of the text. num_evicted: [slots, G] int64, the evicted prompt tokens. KV
    heads may keep different counts. Rows are allocated for the highest possible count.
    """

    def __init__(self, method: "EvictionMethod", layer: int, config: CacheConfig) -> None:
        self.method, self.layer, self.config = method, layer, config
        self.budget = method.layer_budget(layer, config.shape)
        kept = method.max_head_tokens(self.budget.maximum(config.max_tokens), config.shape)
        capacity = min(config.max_tokens, kept + config.max_new_tokens)
        self.kv = make_storage(method.storage, config, capacity)
        self.num_evicted = config.zeros(dtype=torch.int64)
        self.seq_lens, self.stats = config.seq_lens, config.stats

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        length = k.shape[1]
        count = min(self.budget.tokens(length), length)
        width = min(self.method.max_head_tokens(count, self.config.shape), length)
        kept, counts = self.method.select_prompt(q, k, v, count, width)
        self.kv.store(slot, _rows(k, kept), _rows(v, kept), counts)
        self.num_evicted[slot] = length - (count if counts is None else counts)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        num_tokens = (self.seq_lens[:, None] - self.num_evicted).clamp(min=0)  # [slots, G]
        with self.config.deferred.reading(num_tokens, slots):
            self.stats.record(num_tokens[slots], slots)
        return self.kv.attend(q, k, v, num_tokens, slots)

    def step_nbytes(self, seq_len: float, attended: float, cache_hit: float = 0.0) -> StepBytes:
        return StepBytes(self.kv.read_nbytes(attended))


@dataclass
class EvictionMethod(StoredMethod):
    """Keeps the prompt tokens of highest score and every generated token: a subclass defines `score`.

    Tokens are evicted once, after prefill. A budget up to 1 is a share of the prompt's length.
    """

    kind: ClassVar[MethodKind] = "eviction"
    budget_excludes_generated: ClassVar[bool] = True

    budget: Annotated[float, "prompt tokens kept, generated ones not counted: a share up to 1, else a count"] = 0.2

    def make_sparse_cache(self, layer: int, config: CacheConfig) -> LayerCache:
        return PromptEvictionCache(self, layer, config)

    @abstractmethod
    def score(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return a score per KV head and prompt token: [G, L]. The highest are kept.

        q: [H, L, D]; k, v: [G, L, D], rotated. `pin_last` keeps the last tokens regardless of their score.
        """

    def keep(self, scores: Tensor, count: int, width: int) -> tuple[Tensor, Tensor | None]:
        """Return the positions that each KV head keeps, [G, width], and their counts [G], or None if all are `width`.

        Positions ascend. From a KV head's count on they repeat the last token. scores: [G, L]; ties go to the earlier
        position. KV heads keep `count` tokens each, 1 to L, unless a subclass gives them different counts with
        that mean, at most `width`.
        """
        return highest_positions(scores, count), None

    def select_prompt(self, q: Tensor, k: Tensor, v: Tensor, count: int, width: int) -> tuple[Tensor, Tensor | None]:
        """Return the prompt tokens that each KV head keeps, and how many, as `keep`.

        q: [H, L, D]; k, v: [G, L, D]. Raises ValueError if the scores are not [G, L] or, on a CPU, if one is NaN.
        """
        scores = self.score(q, k, v)
        if not isinstance(scores, Tensor) or scores.shape != k.shape[:2]:
            found = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"score returned {found}. It must return a score per KV head and prompt token, {list(k.shape[:2])}."
            )
        _check_numbers(scores, k)
        return self.keep(scores, count, width)

    def max_head_tokens(self, count: int, shape: Shape) -> int:
        """Return the most tokens of a long prompt that one KV head keeps where the mean is `count`."""
        return count


class BoundedKVCache(LayerCache):
    """At most `budget` past tokens per KV head: each step appends the current token, then evicts one.

    tokens: the rows of the cache, unordered; their tensors are also attributes of the cache. A subclass defines the
    scores.
    """

    def __init__(self, method: SparseMethod, layer: int, config: CacheConfig) -> None:
        self.config, self.budgets = config, method.budget_table(layer, config)
        capacity = min(int(self.budgets[-1]) + 1, config.max_tokens)
        self.keys, self.values = (config.zeros(capacity, config.shape.head_dim) for _ in range(2))
        self.positions = config.zeros(capacity, dtype=torch.int64)
        self.scores = config.zeros(capacity, dtype=torch.float32)
        self.num_tokens = config.zeros(dtype=torch.int64)
        self.tokens = KeptTokens(self.keys, self.values, self.positions, self.scores, self.num_tokens)
        self.seq_lens, self.stats = config.seq_lens, config.stats
        self._budget = method.layer_budget(layer, config.shape)

    @abstractmethod
    def prompt_scores(self, q: Tensor, k: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """Return the `count` positions of a prompt to keep, [G, count], and their scores, [G, count] float32.

        None instead of scores: the subclass sets them in `prefill`, after `store_prompt`.
        """

    @abstractmethod
    def evict(self, q: Tensor, slots: Tensor) -> None:
        """Count the current token, update the scores, and evict one token of each KV head that exceeds the budget.

        q: [B, H, 1, D]; slots: [B]. The current token's key and value are in the row num_tokens.
        """

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.store_prompt(slot, k, v, *self.prompt_scores(q, k, self.prompt_count(k.shape[1])))

    def prompt_count(self, length: int) -> int:
        """Return how many of a prompt's `length` tokens a KV head keeps."""
        return min(self._budget.tokens(length), length)

    def store_prompt(self, slot: int, k: Tensor, v: Tensor, kept: Tensor, scores: Tensor | None) -> None:
        """Store the positions kept [G, count] of a prompt k, v [G, L, D], with their scores [G, count] unless None."""
        count = kept.shape[1]
        self.keys[slot, :, :count], self.values[slot, :, :count] = _rows(k, kept), _rows(v, kept)
        self.positions[slot, :, :count] = kept
        if scores is not None:
            self.scores[slot, :, :count] = scores
        self.num_tokens[slot].fill_(count)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        out = attend_and_append(q, k, v, self.keys, self.values, self.num_tokens, slots)
        with self.config.deferred.reading(q, slots):
            self.stats.record(self.num_tokens[slots], slots)
            self.evict(q, slots)
        return out

    def step_nbytes(self, seq_len: float, attended: float, cache_hit: float = 0.0) -> StepBytes:
        return StepBytes(attended * self.config.token_nbytes)

    def free_slot(self, slot: int) -> None:
        self.num_tokens[slot].zero_()


class DecodingEvictionCache(BoundedKVCache):
    """A BoundedKVCache whose subclass scores the rows at each step."""

    @abstractmethod
    def step_scores(self, q: Tensor, slots: Tensor, new_seq_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new scores of the rows, and their priorities: [B, G, rows] each. The lowest priority is evicted.

        The rows include the current token. new_seq_lens: [B] int64, sequence lengths with the current token.
        """

    def evict(self, q: Tensor, slots: Tensor) -> None:
        past = self.seq_lens[slots].clamp(max=self.config.max_tokens - 1)
        num_rows = self.tokens.begin_token(slots, past)
        new_seq_lens = past + 1
        scores, priorities = self.step_scores(q, slots, new_seq_lens)
        self.scores[slots] = scores
        lowest = find_lowest(self.tokens, slots, priorities, num_rows, self.budgets[new_seq_lens])
        replace_rows(self.tokens, slots, lowest)


class AttentionEvictionCache(BoundedKVCache):
    """A BoundedKVCache that evicts the token with the least attention; scores are the attention.

    accumulate: whether scores are the attention of all steps, or of the latest one. shared: whether they are summed
    over all KV heads of the layer, which then must keep the same prompt tokens in the same order.
    """

    accumulate: ClassVar[bool]
    shared: ClassVar[bool]

    def __init__(self, method: SparseMethod, layer: int, config: CacheConfig) -> None:
        super().__init__(method, layer, config)
        self._recent = self.recent_tokens(self.budgets)

    @abstractmethod
    def recent_tokens(self, budgets: Tensor) -> Tensor:
        """Return how many of the latest tokens always stay, 1 to the budget, per budget of a table [N] int64: [N]."""

    def evict(self, q: Tensor, slots: Tensor) -> None:
        evict_least_attended(
            q, self.tokens, self.seq_lens, slots, self.budgets, self._recent,
            accumulate=self.accumulate, shared=self.shared,
        )  # fmt: skip


def check_voting(window: int, kernel: int) -> None:
    """Raise ValueError unless `window` last tokens can vote and votes can be pooled over `kernel` positions."""
    if window < 1:
        raise ValueError(f"window={window} must be 1 token or more.")
    if not 1 <= kernel <= _MAX_KERNEL or kernel % 2 == 0:
        raise ValueError(f"kernel={kernel} must be an odd number of positions, 1 to {_MAX_KERNEL}.")


def pin_last(scores: Tensor, count: int) -> Tensor:
    """Return scores [G, L] with the last `count` tokens above all others, the last one highest."""
    count = min(count, scores.shape[1])
    if not count:
        return scores
    rising = _PINNED * torch.arange(1, count + 1, dtype=torch.float32, device=scores.device)
    return torch.cat((scores[:, :-count], rising.expand(len(scores), -1)), 1)


def _check_numbers(scores: Tensor, k: Tensor) -> None:
    """Raise ValueError if scores [G, L] of a prompt k [G, L, D] are NaN; not on a GPU, where that would synchronise.

    If keys are not finite, neither are the logits, which are an error of their own.
    """
    if scores.is_cuda:
        return
    counts = scores.isnan().sum(1)
    if counts.any() and k.isfinite().all():
        head = int(counts.argmax())
        raise ValueError(
            f"score returned NaN for {counts[head]} of {scores.shape[1]} tokens of KV head {head}. Scores must be "
            f"numbers; -inf puts a token last."
        )


def _rows(x: Tensor, kept: Tensor) -> Tensor:
    """Return the tokens kept [G, N] of x [G, L, D]: [G, N, D]."""
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
