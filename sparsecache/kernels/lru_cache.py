"""LRU cache of key and value rows on the GPU, in front of a store in host memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_options, pdl_wait, tl, triton, use_kernel
from sparsecache.kernels.rows import mask_of_first

LOOKUP_PARTS = 4  # into which a lookup divides the selection of a KV head, one program each
_LOOKUP_BLOCK, _INSERT_BLOCK = 2048, 4096  # most tokens that a program handles at a time
_COPY_PROGRAMS, _COPY_ROWS, _COPY_WARPS = 64, 32, 8  # launch sizes of the copy into the cache


class CacheLookup(NamedTuple):
    """Which rows of a step an LRUCache holds.

    places: [B, G, N] int32, the cache row of each selected token, or -1.
    miss_ranks, miss_tokens: [B, G, N] int32, the rank in the selection and the position of each token not in the cache.
    They are listed per part of ceil(N / parts) ranks, each list at the start of its part.
    miss_counts: [B, G, parts] int32, the length of each list.
    """

    places: Tensor
    miss_ranks: Tensor
    miss_tokens: Tensor
    miss_counts: Tensor


class LRUCache(NamedTuple):
    """The C most recently used rows of each slot and KV head, of one layer.

    A step uses all tokens that it selects. Among them, those it found in the cache count as used before those it
    fetched, each in the order of the selection.

    rows: [slots, G, C, 2, D], keys and values.
    row_of_token: [slots, G, T] int32, the cache row of each token, or -1.
    token_of_row: [slots, G, C] int32, the token in each cache row, or -1.
    lru_order: [slots, G, C] int32, the cache rows from the least to the most recently used.
    hits: [2, slots, G] int64, selected tokens found in the cache: over all steps, and in the slot's latest step.
    """

    rows: Tensor
    row_of_token: Tensor
    token_of_row: Tensor
    lru_order: Tensor
    hits: Tensor

    def lookup(self, slots: Tensor, selected: Tensor, counts: Tensor) -> CacheLookup:
        """Look up selected tokens. The result is valid until the next `insert`.

        slots: [B] int64; selected: [B, G, N] int64, the first counts [B, G] (int64) of a KV head valid and distinct.
        """
        batch, kv_heads, width = selected.shape
        part_size = max(1, -(-width // LOOKUP_PARTS))
        if use_kernel(selected):
            sizes = (width, width, width, LOOKUP_PARTS)
            found = CacheLookup(*(slots.new_empty((batch, kv_heads, size), dtype=torch.int32) for size in sizes))
            block = min(_LOOKUP_BLOCK, next_power_of_2(part_size, 128))
            _lookup_kernel[(batch * kv_heads, LOOKUP_PARTS)](
                self.row_of_token, slots, selected.contiguous(), counts.contiguous(), *found,
                kv_heads, self.row_of_token.shape[2], width, part_size,
                BLOCK=block, num_warps=max(4, block // 256), **pdl_options(),
            )  # fmt: skip
            return found
        rank, head = (torch.arange(size, device=slots.device) for size in (width, kv_heads))
        valid, part = mask_of_first(counts, width), rank // part_size
        places = self.row_of_token[slots[:, None, None], head[:, None], selected.masked_fill(~valid, 0)]
        miss = valid & (places < 0)
        ranks = (2 * part + ~miss).argsort(dim=-1, stable=True)
        miss_counts = torch.stack([(miss & (part == each)).sum(2) for each in range(LOOKUP_PARTS)], 2)
        return CacheLookup(
            places.masked_fill(~valid, -1), ranks.int(), selected.gather(2, ranks).int(), miss_counts.int()
        )

    def insert(self, slots: Tensor, selected: Tensor, counts: Tensor, places: Tensor, rows: Tensor) -> None:
        """Mark selected tokens as used, and insert those that the cache does not hold.

        They replace the least recently used. slots, selected, counts: as in `lookup`; places: its result;
        rows: [B, G, N, 2, D], not read where found in the cache. A token of this step is never evicted; if no other is
        left, the remaining tokens are not inserted.
        """
        if use_kernel(selected):
            self._launch_insert(slots, selected, counts, places, rows)
            return
        size, device = self.token_of_row.shape[2], slots.device
        heads = torch.arange(selected.shape[1], device=device)
        index = (slots[:, None], heads)
        valid = mask_of_first(counts, selected.shape[2])
        where, place = self.row_of_token[index].long(), places.long()
        hit, miss = valid & (place >= 0), valid & (place < 0)
        hits = hit.sum(2, keepdim=True)
        inserts = torch.minimum(miss.sum(2, keepdim=True), size - hits)

        order = self.lru_order[index].long()
        used = torch.zeros(*order.shape[:2], size + 1, dtype=torch.bool, device=device)
        used = used.scatter(2, place.masked_fill(~hit, size), True)[..., :-1].gather(2, order)
        order = order.gather(2, used.int().argsort(dim=-1, stable=True))  # the unused first, the least recent first
        rank = miss.cumsum(2) - 1
        is_inserted = miss & (rank < inserts)
        new_place = order.gather(2, rank.clamp(0, size - 1))

        # Scatters of invalid entries go to an extra last column.
        where, tokens = (torch.cat((x, x[..., :1]), 2) for x in (where, self.token_of_row[index].long()))
        target = new_place.masked_fill(~is_inserted, size)
        old = tokens.gather(2, target)
        where.scatter_(2, old.masked_fill(~is_inserted | (old < 0), where.shape[2] - 1), -1)
        where.scatter_(2, selected.masked_fill(~is_inserted, where.shape[2] - 1), new_place)
        tokens.scatter_(2, target, selected)
        self.row_of_token[index], self.token_of_row[index] = where[..., :-1].int(), tokens[..., :-1].int()

        unused = torch.arange(size, device=device) - inserts
        targets = (
            unused.masked_fill((unused < 0) | (unused >= size - hits - inserts), size),
            (size - hits - inserts + hit.cumsum(2) - 1).masked_fill(~hit, size),
            (size - inserts + rank).masked_fill(~is_inserted, size),
        )
        new_order = order.new_zeros(*order.shape[:2], size + 1)
        new_order.scatter_(2, torch.cat(targets, 2), torch.cat((order, place, new_place), 2))
        self.lru_order[index] = new_order[..., :-1].int()
        self.hits[0, slots] += hits[..., 0]
        self.hits[1, slots] = hits[..., 0]
        slot, head = (x.expand(is_inserted.shape)[is_inserted] for x in (slots[:, None, None], heads[:, None]))
        self.rows[slot, head, new_place[is_inserted]] = rows[is_inserted]

    def _launch_insert(self, slots: Tensor, selected: Tensor, counts: Tensor, places: Tensor, rows: Tensor) -> None:
        batch, kv_heads, width = selected.shape
        size, device, programs = self.token_of_row.shape[2], slots.device, batch * kv_heads
        selected, counts = selected.contiguous(), counts.contiguous()
        new_places = torch.empty((batch, kv_heads, width), device=device, dtype=torch.int32)
        scratch = torch.empty((2, batch, kv_heads, size), device=device, dtype=torch.int32)
        block = min(_INSERT_BLOCK, next_power_of_2(max(size, width), 128))
        _insert_kernel[(programs,)](
            self.row_of_token, self.token_of_row, self.lru_order, self.hits, scratch, slots, selected, counts, places,
            new_places, kv_heads, self.row_of_token.shape[2], width, size, programs * size, self.hits.stride(0),
            BLOCK=block, num_warps=max(4, block // 256), num_stages=1, **pdl_options(),
        )  # fmt: skip
        row_size = 2 * rows.shape[4]
        _copy_rows_kernel[(programs, max(1, _COPY_PROGRAMS // programs))](
            rows, self.rows, slots, counts, new_places, kv_heads, width, size, row_size,
            ROWS=_COPY_ROWS, BLOCK=next_power_of_2(row_size), num_warps=_COPY_WARPS, **pdl_options(),
        )  # fmt: skip


@triton.jit
def _lookup_kernel(  # type: ignore[no-untyped-def]
    where, slots, selected, counts, places, miss_ranks, miss_tokens, miss_counts, kv_heads, capacity, width, part_size,
    BLOCK: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Look up one part of a KV head's selection, and list what the cache does not hold."""
    pdl_wait(USE_PDL)
    program, part = tl.program_id(0), tl.program_id(1)
    head = tl.load(slots + program // kv_heads).to(tl.int64) * kv_heads + program % kv_heads
    base, misses = program.to(tl.int64) * width, 0
    end = tl.minimum(part * part_size + part_size, tl.load(counts + program).to(tl.int32))
    for first in tl.range(part * part_size, end, BLOCK):
        rank = first + tl.arange(0, BLOCK)
        token = tl.load(selected + base + rank, mask=rank < end, other=0)
        place = tl.load(where + head * capacity + token, mask=rank < end, other=0)
        tl.store(places + base + rank, place, mask=rank < end)
        is_miss = (place < 0).to(tl.int32)
        target = base + part * part_size + misses + tl.cumsum(is_miss, axis=0) - 1
        tl.store(miss_ranks + target, rank, mask=place < 0)
        tl.store(miss_tokens + target, token.to(tl.int32), mask=place < 0)
        misses += tl.sum(is_miss)
    tl.store(miss_counts + program * tl.num_programs(1) + part, misses)


@triton.jit
def _insert_kernel(  # type: ignore[no-untyped-def]
    where, tokens, order, hits, scratch, slots, selected, counts, places, new_places,
    kv_heads, capacity, width, size, scratch_size, hits_stride, BLOCK: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Update one KV head: mark hits, evict the least recently used, insert misses."""
    pdl_wait(USE_PDL)
    program, offset = tl.program_id(0), tl.arange(0, BLOCK)
    head = tl.load(slots + program // kv_heads).to(tl.int64) * kv_heads + program % kv_heads
    count = tl.load(counts + program).to(tl.int32)
    base = program.to(tl.int64) * width
    where, tokens, order = where + head * capacity, tokens + head * size, order + head * size
    selected, places, new_places = selected + base, places + base, new_places + base
    is_used = scratch + program * size  # per cache row, whether this step uses it
    free_places = is_used + scratch_size  # the least recently used rows, which the misses get
    for first in tl.range(0, size, BLOCK):
        tl.store(is_used + first + offset, 0, mask=first + offset < size)
    tl.debug_barrier()
    found = 0
    for first in tl.range(0, count, BLOCK):
        valid = first + offset < count
        place = tl.load(places + first + offset, mask=valid, other=-1)
        tl.store(is_used + place, 1, mask=place >= 0)
        found += tl.sum((place >= 0).to(tl.int32))
    inserts = tl.minimum(count, size) - found
    tl.debug_barrier()
    unused_before = 0
    for first in tl.range(0, size, BLOCK):
        inside = first + offset < size
        place = tl.load(order + first + offset, mask=inside, other=0)
        unused = (tl.load(is_used + place, mask=inside, other=1) == 0).to(tl.int32)
        rank = unused_before + tl.cumsum(unused, axis=0) - 1
        tl.debug_barrier()  # all threads must read this block of the order before any overwrites it
        tl.store(free_places + rank, place, mask=(unused > 0) & (rank < inserts))
        tl.store(order + rank - inserts, place, mask=(unused > 0) & (rank >= inserts))
        unused_before += tl.sum(unused)
    tl.debug_barrier()
    latest = order + size - found - inserts
    hits_before, misses_before = 0, 0
    for first in tl.range(0, count, BLOCK):
        valid = first + offset < count
        token = tl.load(selected + first + offset, mask=valid, other=0)
        place = tl.load(places + first + offset, mask=valid, other=-1)
        is_hit, is_miss = valid & (place >= 0), valid & (place < 0)
        packed = is_hit.to(tl.int32) + (is_miss.to(tl.int32) << 16)  # one scan for two counts, as BLOCK < 2^15
        scanned = tl.cumsum(packed, axis=0)
        hit_rank, rank = hits_before + (scanned & 0xFFFF) - 1, misses_before + (scanned >> 16) - 1
        tl.store(latest + hit_rank, place, mask=is_hit)
        is_inserted = is_miss & (rank < inserts)
        new_place = tl.load(free_places + rank, mask=is_inserted, other=0)
        old = tl.load(tokens + new_place, mask=is_inserted, other=-1)
        tl.store(where + old, -1, mask=old >= 0)
        tl.store(where + token, new_place, mask=is_inserted)
        tl.store(tokens + new_place, token.to(tl.int32), mask=is_inserted)
        tl.store(latest + found + rank, new_place, mask=is_inserted)
        tl.store(new_places + first + offset, tl.where(is_inserted, new_place, -1), mask=valid)
        total = tl.sum(packed)
        hits_before += total & 0xFFFF
        misses_before += total >> 16
    tl.store(hits + head, tl.load(hits + head) + found)
    tl.store(hits + hits_stride + head, found)


@triton.jit
def _copy_rows_kernel(  # type: ignore[no-untyped-def]
    rows, cache, slots, counts, places, kv_heads, width, cache_capacity, row_size,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Copy the rows of a KV head that have a place to the cache."""
    pdl_wait(USE_PDL)
    program, column = tl.program_id(0), tl.arange(0, BLOCK)[None, :]
    head = tl.load(slots + program // kv_heads).to(tl.int64) * kv_heads + program % kv_heads
    count = tl.load(counts + program).to(tl.int32)
    for first in tl.range(tl.program_id(1) * ROWS, count, tl.num_programs(1) * ROWS):
        rank = program.to(tl.int64) * width + first + tl.arange(0, ROWS)
        place = tl.load(places + rank, mask=first + tl.arange(0, ROWS) < count, other=-1).to(tl.int64)
        mask = (place >= 0)[:, None] & (column < row_size)
        block = tl.load(rows + rank[:, None] * row_size + column, mask=mask, other=0.0)
        tl.store(cache + (head * cache_capacity + place)[:, None] * row_size + column, block, mask=mask)
