"""The base class of sparse methods: a budget, dense first layers, and the report of kept tokens."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from torch import Tensor

from sparsecache.cache.base import CacheConfig, CacheMethod, LayerCache, Shape
from sparsecache.cache.budget import Budget
from sparsecache.cache.full import FullCache
from sparsecache.cache.stats import SequenceStats
from sparsecache.cache.storage import Storage, make_storage


@dataclass
class SparseMethod(CacheMethod):
    """Attends to at most `budget` past tokens per KV head in every layer but the first `dense_layers`.

    min_dense_layers: fewest layers that must stay dense. budget_excludes_generated: whether the budget
    limits prompt tokens only, and generated tokens are kept in addition.
    """

    min_dense_layers: ClassVar[int] = 0
    budget_excludes_generated: ClassVar[bool] = False

    budget: Annotated[float, "most past tokens attended to: a share of them up to 1, else a count"] = 0.2
    dense_layers: Annotated[int, "first layers that attend to all past tokens, 0 or more"] = 2

    def __post_init__(self) -> None:
        Budget(self.budget)
        if self.dense_layers < self.min_dense_layers:
            raise ValueError(f"dense_layers={self.dense_layers} must be {self.min_dense_layers} or more.")
        self._tables: dict[tuple[Any, ...], Tensor] = {}

    def check(self, shape: Shape) -> None:
        if self.dense_layers > shape.layers:
            raise ValueError(
                f"dense_layers={self.dense_layers} must be {self.min_dense_layers} to {shape.layers}, the layers of "
                f"this model."
            )

    def make_cache(self, layer: int, config: CacheConfig) -> LayerCache:
        if layer == 0:
            self._tables.clear()
        return self.make_full_cache(config) if layer < self.dense_layers else self.make_sparse_cache(layer, config)

    def make_full_cache(self, config: CacheConfig) -> FullCache:
        """Return the cache of a dense layer."""
        return FullCache(config)

    @abstractmethod
    def make_sparse_cache(self, layer: int, config: CacheConfig) -> LayerCache:
        """Return the cache of a sparse layer, as `make_cache`."""

    def layer_budget(self, layer: int, shape: Shape) -> Budget:
        """Return the budget of a layer: the same for all, unless a method overrides this."""
        return Budget(self.budget)

    def budget_table(self, layer: int, config: CacheConfig) -> Tensor:
        """Return the most tokens to attend to, by past tokens: [max_tokens + 1] int64, shared by equal budgets."""
        budget = self.layer_budget(layer, config.shape)
        key = (budget, config.device, config.max_tokens)
        if key not in self._tables:
            self._tables[key] = budget.table(config.max_tokens, config.device)
        return self._tables[key]

    def capped_steps(self, stats: SequenceStats) -> int:
        """Return how many steps had more past tokens than the budget."""
        budget = Budget(self.budget)
        if self.budget_excludes_generated:
            return stats.steps if stats.prompt_tokens > budget.tokens(stats.prompt_tokens) else 0
        first = stats.prompt_tokens
        return sum(past > budget.tokens(past) for past in range(first, first + stats.steps))

    def report(self, stats: SequenceStats) -> dict[str, Any]:
        sparse = stats.sparse_layers > 0
        return {
            "kept": stats.kept,
            "sparse_steps": stats.steps if sparse else 0,
            "capped_steps": self.capped_steps(stats) if sparse else 0,
            "dense_layers": stats.dense_layers,
        }


@dataclass
class StoredMethod(SparseMethod):
    """A sparse method that only adds tokens at the end, so that they can be stored in fewer bits."""

    storage: Annotated[Storage, "keys and values: in full precision, or quantised as by kivi"] = field(
        default="full", kw_only=True
    )

    def make_full_cache(self, config: CacheConfig) -> FullCache:
        return FullCache(config, kv=make_storage(self.storage, config, config.max_tokens))
