"""Gather selected rows of a store on the device or in pinned host memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_options, pdl_wait, tl, triton, use_kernel
from sparsecache.kernels.decode import CachedRows, attend_gathered
from sparsecache.kernels.lru_cache import LOOKUP_PARTS, CacheLookup, LRUCache
from sparsecache.kernels.rows import mask_of_first, take_rows

# 16 programs, each with two blocks of 32 rows in flight, saturate a link to the host. More requests would wait in its
# queue, and the loads of all other kernels behind them.
_PROGRAMS, _ROWS, _WARPS = 16, 32, 8


@dataclass(frozen=True)
class GatheredRows:
    """Rows of a selection on the device that attends to them.

    rows: [B, G, N, 2, D], keys and values. `lru` has the rows that `cached` names; these are missing in `rows`.
    """

    rows: Tensor
    lru: LRUCache | None = None
    cached: CachedRows | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
        """Attend over the rows and the new token: equals attend_selected over the store.

        Call it before the next `insert` into the cache, which may overwrite cached rows.
        """
        return attend_gathered(q, k, v, self.rows, counts, self.cached)

    def insert(self, slots: Tensor, selected: Tensor, counts: Tensor) -> None:
        """Insert the rows into the LRU cache, if there is one. Arguments as in `gather_rows`."""
        if self.lru is not None and self.cached is not None:
            self.lru.insert(slots, selected, counts, self.cached.places, self.rows)


def gather_rows(
    store: Tensor, slots: Tensor, selected: Tensor, counts: Tensor, lru: LRUCache | None = None
) -> GatheredRows:
    """Gather the rows of `store` that attend_selected would read.

    store: [slots, G, T, 2, D], keys and values, contiguous, on the device or in pinned host memory; slots: [B] int64;
    selected: [B, G, N] int64, the first counts [B, G] (int64) of a KV head valid and distinct.
    lru: a cache of the store's rows; rows that it holds are not read from the store.
    """
    if lru is None:
        return GatheredRows(_gather(store, slots, selected, counts, None))
    found = lru.lookup(slots, selected, counts)
    rows = _gather(store, slots, selected, counts, found)
    return GatheredRows(rows, lru, CachedRows(lru.rows, slots, found.places))


def _gather(store: Tensor, slots: Tensor, selected: Tensor, counts: Tensor, found: CacheLookup | None) -> Tensor:
    """Return rows [B, G, N, 2, D], undefined where they are invalid or found in the cache."""
    batch, kv_heads, width = selected.shape
    if not use_kernel(selected):
        valid = mask_of_first(counts, width)
        slots, rows = slots.to(store.device), selected.masked_fill(~valid, 0).to(store.device)
        return take_rows(store, slots, rows).to(selected.device)
    out = torch.empty((*selected.shape, *store.shape[3:]), device=selected.device, dtype=store.dtype)
    row_size, parts = 2 * store.shape[4], 1 if found is None else LOOKUP_PARTS
    ranks, tokens, numbers = (selected, selected, counts) if found is None else found[1:]
    _gather_rows_kernel[(_PROGRAMS,)](
        store, slots, tokens.contiguous(), ranks, numbers.contiguous(), out,
        batch * kv_heads * parts, kv_heads, store.shape[2], width, -(-width // parts), row_size,
        HAS_RANKS=found is not None, PARTS=parts, LISTS=next_power_of_2(batch * kv_heads * parts), ROWS=_ROWS,
        BLOCK=next_power_of_2(row_size), num_warps=_WARPS, **pdl_options(),
    )  # fmt: skip
    return out


@triton.jit
def _block_rows(  # type: ignore[no-untyped-def]
    block, slots, tokens, ranks, counts, blocks, ends, kv_heads, capacity, width, part_size,
    HAS_RANKS: tl.constexpr, PARTS: tl.constexpr, LISTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Return the source rows, target rows and mask of a block, counted over all lists."""
    owner = tl.sum((ends <= block).to(tl.int32))
    is_owner = tl.arange(0, LISTS) == owner
    count = tl.sum(tl.where(is_owner, counts, 0))  # 0 beyond the last block, which no list owns
    rank = (block - tl.sum(tl.where(is_owner, ends - blocks, 0))) * ROWS + tl.arange(0, ROWS)
    mask, head = rank < count, owner // PARTS
    first = head.to(tl.int64) * width
    source = first + owner % PARTS * part_size + rank
    slot = tl.load(slots + head // kv_heads, mask=count > 0, other=0).to(tl.int64)
    token = tl.load(tokens + source, mask=mask, other=0)
    target = source
    if HAS_RANKS:
        target = first + tl.load(ranks + source, mask=mask, other=0)
    return (slot * kv_heads + head % kv_heads) * capacity + token, target, mask


@triton.jit
def _gather_rows_kernel(  # type: ignore[no-untyped-def]
    store, slots, tokens, ranks, numbers, out, lists, kv_heads, capacity, width, part_size, row_size: tl.constexpr,
    HAS_RANKS: tl.constexpr, PARTS: tl.constexpr, LISTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """Copy the rows of all lists, block by block.

    The link to the host is fastest on ascending runs, so programs take blocks in turn: the blocks in flight are close
    to each other. Each program stores one block while the next is in flight and the indices of the one after are
    loaded. row_size is constexpr: otherwise Triton loads a block row by row.
    """
    pdl_wait(USE_PDL)
    program, programs, each = tl.program_id(0), tl.num_programs(0), tl.arange(0, LISTS)
    counts = tl.load(numbers + each, mask=each < lists, other=0).to(tl.int32)
    blocks = tl.cdiv(counts, ROWS)
    ends, total, column = tl.cumsum(blocks, axis=0), tl.sum(blocks), tl.arange(0, BLOCK)[None, :]
    inside = column < row_size
    source, target, mask = _block_rows(
        program, slots, tokens, ranks, counts, blocks, ends, kv_heads, capacity, width, part_size,
        HAS_RANKS, PARTS, LISTS, ROWS,
    )  # fmt: skip
    rows = tl.load(store + source[:, None] * row_size + column, mask=mask[:, None] & inside)
    source, next_target, next_mask = _block_rows(
        program + programs, slots, tokens, ranks, counts, blocks, ends, kv_heads, capacity, width, part_size,
        HAS_RANKS, PARTS, LISTS, ROWS,
    )  # fmt: skip
    # Unrolled by two: copying an in-flight load from one variable to another would stall.
    for block in tl.range(program + 2 * programs, total + 2 * programs, 2 * programs):
        next_rows = tl.load(store + source[:, None] * row_size + column, mask=next_mask[:, None] & inside)
        source, later_target, later_mask = _block_rows(
            block, slots, tokens, ranks, counts, blocks, ends, kv_heads, capacity, width, part_size,
            HAS_RANKS, PARTS, LISTS, ROWS,
        )  # fmt: skip
        tl.store(out + target[:, None] * row_size + column, rows, mask=mask[:, None] & inside)
        rows = tl.load(store + source[:, None] * row_size + column, mask=later_mask[:, None] & inside)
        target, mask = later_target, later_mask
        source, later_target, later_mask = _block_rows(
            block + programs, slots, tokens, ranks, counts, blocks, ends, kv_heads, capacity, width, part_size,
            HAS_RANKS, PARTS, LISTS, ROWS,
        )  # fmt: skip
        tl.store(out + next_target[:, None] * row_size + column, next_rows, mask=next_mask[:, None] & inside)
        next_target, next_mask = later_target, later_mask
