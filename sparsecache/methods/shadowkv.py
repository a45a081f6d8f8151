"""ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference (ICML'25, arXiv 2410.21465).

Keys before RoPE have a low rank. The prompt's keys of all KV heads together are stored as `rank` coefficients per token
and a basis. Keys of selected tokens are rebuilt from these and rotated. Values may lie in host memory. Pages of `page`
tokens are selected by the attention of the query to their mean keys. Outliers are the pages with the key least similar
to the page's mean. Outliers, the last pages of the prompt and all generated tokens are stored exactly and always
attended to.

GQA: as in the authors' code, a KV head takes a page's highest attention of its query heads, each after a softmax over
the pages that are not stored exactly.

Differences:

- The budget counts all prompt tokens that are attended to. The authors' 2,048 tokens are those of the selected pages;
  48 outliers and 4 last pages of 8 tokens come on top. Here these have shares of the budget near the authors'.
- Values stay on the device without `offload`.
- The basis comes from subspace iteration on K^T K, not from a singular value decomposition. This is faster and does not
  wait for the host. The tests bound its error to 1.03 times the lowest possible one.

Rank and page are the paper's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig, LayerCache, MethodKind, Shape, StepBytes
from sparsecache.cache.checks import check_budget_shares, check_page_size
from sparsecache.cache.host import allocate, check_host_memory, copy_into
from sparsecache.cache.sparse import SparseMethod
from sparsecache.kernels.decode import CachedRows, attend_gathered
from sparsecache.kernels.gather import gather_rows
from sparsecache.kernels.lru_cache import LRUCache
from sparsecache.kernels.page_means import page_means
from sparsecache.kernels.page_selection import select_pages
from sparsecache.kernels.page_shares import highest_page_shares
from sparsecache.kernels.rebuild import append_exact, rebuild_rows
from sparsecache.kernels.rotation import Rotation
from sparsecache.kernels.speculation import speculated_scores
from sparsecache.kernels.threshold import Selection
from sparsecache.kernels.unrotate import unrotate_keys

_RANK = 160  # the default; a model whose KV heads have fewer channels together takes as many
_RIDGE = 2e-15  # of the diagonal, times the channels; for vectors of a smaller rank. A sixth is too little
_SHIFT = 1e-20  # of the eigenvalues of K^T K, so that keys of zeros have a basis


class _PromptTables(NamedTuple):
    """What depends only on the length of a prompt and how many of its pages are stored exactly.

    numbers: [3] int64, the pages with a mean key, the tokens beyond the budget, and the position minus the place of
    tokens from the last pages on. is_exact: [pages] bool, the last pages. in_page: [page] int64, 0, 1, ... last:
    [G, ..] int64, the positions from the last pages on. rows: [G, E] int32, 0, 1, ... per head.
    """

    numbers: Tensor
    is_exact: Tensor
    in_page: Tensor
    last: Tensor
    rows: Tensor


@dataclass
class _Shared:
    """What the caches of a device share.

    rotation: of the positions 0 to max_tokens - 1. start: [G D, R] float64, random vectors that the subspace iteration
    starts from. tables_of: returns the tables of a prompt, and keeps those of the latest one for the next layers, which
    use the same stream.
    """

    rotation: Rotation
    start: Tensor
    tables_of: Callable[[int, int, int, int], _PromptTables]


@dataclass
class ShadowKV(SparseMethod):
    """Selects pages by their mean keys, and rebuilds the selected keys from a low rank."""

    kind: ClassVar[MethodKind] = "selection"
    absent_options: ClassVar[Mapping[str, str]] = {
        "storage": "it stores keys by their rank, set by the option rank, and values in the model's dtype. Use "
        "offload=true to save GPU memory, or a method that selects from quantised keys, such as quest."
    }
    budget_excludes_generated: ClassVar[bool] = True
    uses_rope = True
    prompt_queries = 0

    budget: Annotated[float, "prompt tokens attended to, without generated ones: a share up to 1, else a count"] = 0.2
    rank: Annotated[int, "rank of the keys of all KV heads together, 1 to their channels"] = _RANK
    page: Annotated[int, "tokens in a page, 1 to 1024"] = 8
    outliers: Annotated[float, "share of the budget for pages with keys unlike their mean, 0 to 1, rounded down"] = 0.15
    recent: Annotated[float, "share of the budget for the prompt's last pages, 0 to 1, rounded down"] = 0.015
    offload: Annotated[bool, "keep the values of the sparse layers in pinned host memory"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._shared: dict[torch.device, _Shared] = {}
        check_page_size(self.page)
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be 1 or more.")
        check_budget_shares(outliers=self.outliers, recent=self.recent)

    def check(self, shape: Shape) -> None:
        super().check(shape)
        channels = shape.kv_heads * shape.head_dim
        if self.rank > max(channels, _RANK):
            raise ValueError(f"rank={self.rank} must be at most {channels}, this model's channels of all KV heads.")

    def exact_pages(self, budget: int) -> tuple[int, int]:
        """Return how many outlier pages and how many last pages a budget in tokens has."""
        return int(self.outliers * budget) // self.page, int(self.recent * budget) // self.page

    def make_sparse_cache(self, layer: int, config: CacheConfig) -> "ShadowKVCache":
        if layer == self.dense_layers:
            self._shared.clear()
            if self.offload:
                layers = config.shape.layers - layer
                check_host_memory(layers * config.slots * config.max_tokens * config.token_nbytes // 2)
        if config.device not in self._shared:
            rotation = self.rope(torch.arange(config.max_tokens, device=config.device))
            channels = config.shape.kv_heads * config.shape.head_dim
            start = torch.randn(
                channels, min(self.rank, channels), dtype=torch.float64, generator=torch.Generator().manual_seed(0)
            )
            tables_of = lru_cache(maxsize=1)(partial(_prompt_tables, self.page, config))
            self._shared[config.device] = _Shared(rotation, start.to(config.device), tables_of)
        return ShadowKVCache(self, layer, config, self._shared[config.device])


class ShadowKVCache(LayerCache):
    """The coefficients and the basis of a prompt's keys, its values, and the exact rows of some tokens.

    coefficients: [slots, T, R]; basis: [slots, G, R, D]; values: [slots, G, T, D], on the device or in host memory;
    mean_keys: [slots, G, pages, D]. exact: [slots, G, E, 2, D], keys and values of the outliers, then of the tokens
    from the prompt's last pages on. is_exact: [slots, G, pages] bool, the pages stored there. places: [slots, G, T]
    int32, a token's row in `exact`, or -1.
    """

    def __init__(self, method: ShadowKV, layer: int, config: CacheConfig, shared: _Shared) -> None:
        self.method, self.config = method, config
        self._shared = shared
        self.seq_lens, self.stats = config.seq_lens, config.stats
        shape, page, tokens = config.shape, method.page, config.max_tokens
        self._budget = method.layer_budget(layer, shape)
        max_budget = min(self._budget.maximum(tokens), tokens)
        self._width = min(tokens, max_budget + config.max_new_tokens)
        pages, exact_pages = -(-tokens // page), sum(method.exact_pages(max_budget)) + 1  # and a page that is not full
        rank = shared.start.shape[1]
        self.coefficients = torch.zeros((config.slots, tokens, rank), dtype=config.dtype, device=config.device)
        self.basis = config.zeros(rank, shape.head_dim)
        size = (config.slots, shape.kv_heads, tokens, shape.head_dim)
        self.values = allocate(size, config.dtype, config.device, method.offload)
        self.mean_keys = config.zeros(pages, shape.head_dim)
        self.is_exact = ~config.zeros(pages, dtype=torch.bool)
        self.exact = config.zeros(exact_pages * page + config.max_new_tokens, 2, shape.head_dim)
        self.places = config.zeros(tokens, dtype=torch.int32)
        self._numbers = config.seq_lens.new_zeros(3, config.slots)  # as _PromptTables.numbers
        self._num_pages, self._over_budget, self._tail_offset = self._numbers

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        length, page = k.shape[1], self.method.page
        count = min(self._budget.tokens(length), length)
        num_outliers, num_recent = self.method.exact_pages(count)
        first = max(0, length // page - num_recent)  # the first of the last pages
        num_outliers = min(num_outliers, first)
        tables = self._shared.tables_of(length, length - count, first, num_outliers)
        with self.config.deferred.after():  # many short kernels, which run in parallel with those below
            unrotated = unrotate_keys(k, self._shared.rotation)
            self.basis[slot] = _low_rank(unrotated, self._shared.start, self.coefficients[slot, :length])[1]
        copy_into(self.values[slot], v)

        _, similarities = page_means(k, page, first, self.mean_keys[slot, :, :first])
        outliers = similarities.topk(num_outliers, dim=1, largest=False).indices
        self.is_exact[slot].copy_(tables.is_exact).scatter_(1, outliers, True)
        self._store_exact(slot, k, v, outliers, tables)
        self._numbers[:, slot] = tables.numbers
        self.config.deferred.join()  # k is not needed any more

    def _store_exact(self, slot: int, k: Tensor, v: Tensor, outliers: Tensor, tables: _PromptTables) -> None:
        """Store exact rows of k, v [G, L, D]: those of the pages outliers [G, N], then those of the last pages."""
        of_outliers = torch.add(tables.in_page, outliers[..., None], alpha=self.method.page).flatten(1)
        positions = torch.cat((of_outliers, tables.last), 1)  # [G, E]
        index = positions[..., None].expand(-1, -1, k.shape[2])
        keys, values = self.exact[slot, :, : positions.shape[1]].unbind(2)
        torch.gather(k, 1, index, out=keys)
        torch.gather(v, 1, index, out=values)
        self.places[slot].fill_(-1).scatter_(1, positions, tables.rows)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        positions, counts = self._select(q, slots)
        rows, exact = self._rows(slots, positions, counts)
        out = attend_gathered(q, k, v, rows, counts, exact)
        with self.config.deferred.reading(k, v, slots, counts):
            append_exact(k, v, self.exact, self.places, self.seq_lens, self._tail_offset, slots)
            self.stats.record(counts, slots)
        return out

    def _select(self, q: Tensor, slots: Tensor) -> Selection:
        scores = speculated_scores(q, None, self.mean_keys, self._num_pages, slots).values
        shares = highest_page_shares(scores, self.is_exact, slots)
        return select_pages(shares, self.seq_lens, slots, self.method.page, self._width, num_excluded=self._over_budget)

    def _rows(self, slots: Tensor, positions: Tensor, counts: Tensor) -> tuple[Tensor, CachedRows]:
        """Return keys and values of the first counts [B, G] positions, [B, G, N, 2, D], and where exact rows lie."""
        values = None if self.method.offload else self.values
        rows, places = rebuild_rows(
            self.coefficients, self.basis, values, self.places, self._shared.rotation, slots, positions, counts
        )
        if self.method.offload:
            halves = self.values.view(*self.values.shape[:3], 2, -1)  # gathered as if they were a key and a value
            unused = self.places
            cached = LRUCache(self.exact, row_of_token=self.places, token_of_row=unused, lru_order=unused, hits=unused)
            rows[..., 1, :] = gather_rows(halves, slots, positions, counts, cached).rows.flatten(3)
        return rows, CachedRows(self.exact, slots, places)

    def step_nbytes(self, seq_len: float, attended: float, cache_hit: float = 0.0) -> StepBytes:
        item, kv_heads = self.config.dtype.itemsize, self.config.shape.kv_heads
        mean_keys = seq_len / self.method.page * self.config.token_nbytes / 2
        keys, values = attended * kv_heads * self.coefficients.shape[2] * item, attended * self.config.token_nbytes / 2
        return StepBytes(mean_keys + keys, values) if self.method.offload else StepBytes(mean_keys + keys + values)


def _prompt_tables(
    page: int, config: CacheConfig, length: int, over_budget: int, first: int, num_outliers: int
) -> _PromptTables:
    """Return the tables of a prompt whose last pages begin with page `first`."""
    device, kv_heads = config.device, config.shape.kv_heads
    numbers = torch.empty(3, dtype=torch.int64, device=device)
    for index, number in enumerate((first, over_budget, (first - num_outliers) * page)):
        numbers[index].fill_(number)  # does not wait for the device, unlike a copy
    is_exact = torch.arange(-(-config.max_tokens // page), device=device) >= first
    last = torch.arange(first * page, length, device=device).expand(kv_heads, -1)
    rows = torch.arange(num_outliers * page + last.shape[1], dtype=torch.int32, device=device).expand(kv_heads, -1)
    return _PromptTables(numbers, is_exact, torch.arange(page, device=device), last, rows)


def _low_rank(keys: Tensor, start: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return an approximation of keys [L, G, D] of rank R: coefficients [L, R], in `out`, and basis [G, R, D].

    The keys of all KV heads are one matrix [L, G D]. start: [G D, R] float64, vectors to start from.
    """
    length, kv_heads, head_dim = keys.shape
    channels, rank = start.shape
    matrix = keys.view(length, channels)
    if rank < channels:
        vectors = _leading_vectors(_gram(matrix).double(), start).to(keys.dtype)
    else:
        vectors = torch.eye(channels, dtype=keys.dtype, device=keys.device)
    return torch.mm(matrix, vectors, out=out), vectors.view(kv_heads, head_dim, rank).mT


def _gram(matrix: Tensor) -> Tensor:
    """Return matrix^T matrix in float32, since half precision would lose its small eigenvalues."""
    if matrix.is_cuda and matrix.dtype != torch.float32:
        return torch.mm(matrix.mT, matrix, out_dtype=torch.float32)
    return matrix.float().mT @ matrix.float()


def _leading_vectors(gram: Tensor, start: Tensor) -> Tensor:
    """Return orthonormal vectors near the eigenvectors of the R largest eigenvalues of gram [N, N]: [N, R] float64.

    Subspace iteration: four products with gram, from start [N, R]. The largest eigenvalues come to dominate all
    vectors V. After two products V (V^T gram V)^-1 evens that out for the next two. It has the span of gram V.
    """
    vectors = _product(gram, start)
    product = _product(gram, vectors)
    vectors = torch.cholesky_solve(product.mT, _factor(vectors, product)).mT
    vectors = _product(gram, _product(gram, vectors))
    orthonormal: Tensor = torch.linalg.solve_triangular(_factor(vectors, vectors).mT, vectors, upper=True, left=False)
    return orthonormal


def _product(gram: Tensor, vectors: Tensor) -> Tensor:
    """Return (gram + shift) vectors."""
    return torch.addmm(vectors, gram, vectors, beta=_SHIFT)


def _factor(left: Tensor, right: Tensor) -> Tensor:
    """Return the Cholesky factor of left^T right [R, R] plus a ridge."""
    matrix = left.mT @ right
    matrix.diagonal().mul_(1 + _RIDGE * len(left))
    factor: Tensor = torch.linalg.cholesky_ex(matrix)[0]  # does not wait for the device, unlike qr and eigh
    return factor
