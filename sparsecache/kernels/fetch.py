"""Selected rows on the device that attends to them: fetched from where they lie, or found among those kept before."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecache.kernels._triton import after_previous, fast, launching, tl, triton, up_to_power
from sparsecache.kernels.decode import Kept, attend_first
from sparsecache.kernels.rows import take_rows

# Programs that keep a link to the host busy, and rows that each asks for at a time, twice over: as much as a link needs
# under way. More wait in its queue, where loads of all other kernels wait behind them.
_LINK, _ROWS, _WARPS = 16, 32, 8
_COPY = 64  # programs that copy what is on the device
_PARTS, _FOUND = 4, 2048  # of a KV head, in which programs find what is kept, so many tokens at a time
_RENEWED = 4096  # tokens at a time


class Found(NamedTuple):
    """Which of a step's rows a `Recent` has.

    places: [B, G, N] int32, where each is there, or -1; ranks, tokens: [B, G, N] int32, which it has not, part by part
    of N / parts, rounded up; new: [B, G, parts] int32, how many these are.
    """

    places: Tensor
    ranks: Tensor
    tokens: Tensor
    new: Tensor


class Recent(NamedTuple):
    """The C rows of each slot and KV head that were fetched, or read, last: of one layer.

    rows: [slots, G, C, 2, D], keys and values; where: [slots, G, T] int32, a token's place among them, or -1; tokens:
    [slots, G, C] int32, what lies in each place, or -1; order: [slots, G, C] int32, the places by their last use, the
    longest ago first; hits: [slots, G] int64, how many of those that were read were here.
    """

    rows: Tensor
    where: Tensor
    tokens: Tensor
    order: Tensor
    hits: Tensor

    def find(self, slots: Tensor, selected: Tensor, counts: Tensor) -> Found:
        """Tells which rows are here. slots: [B]; selected: [B, G, N] int64, the first counts [B, G] meant, none twice.

        What it tells holds until the next `keep`.
        """
        batch, kv_heads, most = selected.shape
        share = -(-most // _PARTS)
        if fast(selected):
            sizes = (most, most, most, _PARTS)
            found = Found(*(slots.new_empty((batch, kv_heads, size), dtype=torch.int32) for size in sizes))
            tokens = min(_FOUND, up_to_power(share, 128))
            _find[(batch * kv_heads, _PARTS)](
                self.where, slots, selected.contiguous(), counts.contiguous(), *found,
                kv_heads, self.where.shape[2], most, share,
                TOKENS=tokens, num_warps=max(4, tokens // 256), **launching(),
            )  # fmt: skip
            return found
        rank, head = (torch.arange(size, device=slots.device) for size in (most, kv_heads))
        meant, part = rank < counts[..., None], rank // share
        places = self.where[slots[:, None, None], head[:, None], selected.masked_fill(~meant, 0)]
        is_new = meant & (places < 0)
        ranks = (2 * part + ~is_new).argsort(dim=-1, stable=True)
        new = torch.stack([(is_new & (part == each)).sum(2) for each in range(_PARTS)], 2)
        return Found(places.masked_fill(~meant, -1), ranks.int(), selected.gather(2, ranks).int(), new.int())

    def keep(self, slots: Tensor, selected: Tensor, counts: Tensor, places: Tensor, rows: Tensor) -> None:
        """Takes note of rows that have been read, and keeps those that were not here yet.

        Those take the places that are longest unused, as long as there are any that this step has not read. slots,
        selected, counts: as in `find`; places: what it found; rows: [B, G, N, 2, D], of those found anything.
        """
        if fast(selected):
            self._keep(slots, selected, counts, places, rows)
            return
        size, device = self.tokens.shape[2], slots.device
        heads = torch.arange(selected.shape[1], device=device)
        index = (slots[:, None], heads)
        meant = torch.arange(selected.shape[2], device=device) < counts[..., None]
        where, place = self.where[index].long(), places.long()
        hit, new = meant & (place >= 0), meant & (place < 0)
        found, kept = hit.sum(2, keepdim=True), torch.minimum(new.sum(2), size - hit.sum(2))[..., None]

        order = self.order[index].long()
        used = torch.zeros(*order.shape[:2], size + 1, dtype=torch.bool, device=device)
        used = used.scatter(2, place.masked_fill(~hit, size), True)[..., :-1].gather(2, order)
        order = order.gather(2, used.int().argsort(dim=-1, stable=True))  # the unused, the longest first; then the used
        rank = new.cumsum(2) - 1
        keeps = new & (rank < kept)
        spare = order.gather(2, rank.clamp(0, size - 1))

        # A column more, for what is not meant.
        where, tokens = (torch.cat((x, x[..., :1]), 2) for x in (where, self.tokens[index].long()))
        there = spare.masked_fill(~keeps, size)
        old = tokens.gather(2, there)
        where.scatter_(2, old.masked_fill(~keeps | (old < 0), where.shape[2] - 1), -1)
        where.scatter_(2, selected.masked_fill(~keeps, where.shape[2] - 1), spare)
        tokens.scatter_(2, there, selected)
        self.where[index], self.tokens[index] = where[..., :-1].int(), tokens[..., :-1].int()

        unused = torch.arange(size, device=device) - kept
        targets = (
            unused.masked_fill((unused < 0) | (unused >= size - found - kept), size),
            (size - found - kept + hit.cumsum(2) - 1).masked_fill(~hit, size),
            (size - kept + rank).masked_fill(~keeps, size),
        )
        latest = order.new_zeros(*order.shape[:2], size + 1)
        latest.scatter_(2, torch.cat(targets, 2), torch.cat((order, place, spare), 2))
        self.order[index] = latest[..., :-1].int()
        self.hits[index] += found[..., 0]
        slot, head = (x.expand(keeps.shape)[keeps] for x in (slots[:, None, None], heads[:, None]))
        self.rows[slot, head, spare[keeps]] = rows[keeps]

    def _keep(self, slots: Tensor, selected: Tensor, counts: Tensor, places: Tensor, rows: Tensor) -> None:
        batch, kv_heads, most = selected.shape
        size, device, owners = self.tokens.shape[2], slots.device, batch * kv_heads
        selected, counts = selected.contiguous(), counts.contiguous()
        given = torch.empty((batch, kv_heads, most), device=device, dtype=torch.int32)  # the place that a new row takes
        notes = torch.empty((2, batch, kv_heads, size), device=device, dtype=torch.int32)
        tokens = min(_RENEWED, up_to_power(max(size, most), 128))
        _renew[(owners,)](
            *self[1:], notes, slots, selected, counts, places, given,
            kv_heads, self.where.shape[2], most, size, owners * size,
            TOKENS=tokens, num_warps=max(4, tokens // 256), num_stages=1, **launching(),
        )  # fmt: skip
        row = 2 * rows.shape[4]
        _put[(owners, max(1, _COPY // owners))](
            rows, self.rows, slots, counts, given, kv_heads, most, size, row,
            ROWS=_ROWS, WIDE=up_to_power(row), num_warps=_WARPS, **launching(),
        )  # fmt: skip


@dataclass(frozen=True)
class Fetched:
    """Selected rows on the device that attends to them, [B, G, N, 2, D]."""

    rows: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
        """What attend_selected would give where the rows came from."""
        return attend_first(q, k, v, self.rows, counts)

    def keep(self, slots: Tensor, selected: Tensor, counts: Tensor) -> None:
        """Keeps them for later steps, if that is asked for. The arguments are those of `gather`."""


@dataclass(frozen=True)
class FetchedBeside(Fetched):
    """The same, but for rows that `recent` has: these are attended to there, as long as nothing is kept."""

    recent: Recent
    kept: Kept

    def attend(self, q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
        return attend_first(q, k, v, self.rows, counts, self.kept)

    def keep(self, slots: Tensor, selected: Tensor, counts: Tensor) -> None:
        self.recent.keep(slots, selected, counts, self.kept.places, self.rows)


def gather(store: Tensor, slots: Tensor, selected: Tensor, counts: Tensor, recent: Recent | None = None) -> Fetched:
    """The rows that attend_selected would read of store [slots, G, T, 2, D], keys and values.

    store may lie in pinned host memory, all else on the GPU. recent: of the store; what is there is not read.
    """
    found = recent.find(slots, selected, counts) if recent is not None else None
    rows = _gathered(store, slots, selected, counts, found)
    if recent is None or found is None:
        return Fetched(rows)
    return FetchedBeside(rows, recent, Kept(recent.rows, slots, found.places))


def _gathered(store: Tensor, slots: Tensor, selected: Tensor, counts: Tensor, found: Found | None) -> Tensor:
    """The rows [B, G, N, 2, D]; of those that are found anything."""
    batch, kv_heads, most = selected.shape
    if not fast(selected):
        meant = torch.arange(most, device=selected.device) < counts[..., None]
        rows = take_rows(store, slots, selected.masked_fill(~meant, 0))
        return torch.where(meant[..., None, None], rows, 0)
    rows = torch.empty((*selected.shape, *store.shape[3:]), device=selected.device, dtype=store.dtype)
    row, parts = 2 * store.shape[4], 1 if found is None else _PARTS
    ranks, tokens, numbers = (selected, selected, counts) if found is None else found[1:]
    _gather[(_LINK,)](
        store, slots, tokens.contiguous(), ranks, numbers.contiguous(), rows,
        batch * kv_heads * parts, kv_heads, store.shape[2], most, -(-most // parts), row, LISTED=found is not None,
        PARTS=parts, OWNERS=up_to_power(batch * kv_heads * parts), ROWS=_ROWS, WIDE=up_to_power(row), num_warps=_WARPS,
        **launching(),
    )  # fmt: skip
    return rows


@triton.jit
def _find(  # type: ignore[no-untyped-def]
    where, slots, selected, counts, places, ranks, tokens, new, kv_heads, room, most, share,
    TOKENS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Of a part of a KV head's tokens, where they are kept, and which are not."""
    after_previous(EARLY)
    owner, part = tl.program_id(0), tl.program_id(1)
    head = tl.load(slots + owner // kv_heads).to(tl.int64) * kv_heads + owner % kv_heads
    asked, fresh = owner.to(tl.int64) * most, 0
    end = tl.minimum(part * share + share, tl.load(counts + owner).to(tl.int32))
    for first in tl.range(part * share, end, TOKENS):
        rank = first + tl.arange(0, TOKENS)
        token = tl.load(selected + asked + rank, mask=rank < end, other=0)
        place = tl.load(where + head * room + token, mask=rank < end, other=0)
        tl.store(places + asked + rank, place, mask=rank < end)
        is_new = (place < 0).to(tl.int32)
        listed = asked + part * share + fresh + tl.cumsum(is_new, axis=0) - 1
        tl.store(ranks + listed, rank, mask=place < 0)
        tl.store(tokens + listed, token.to(tl.int32), mask=place < 0)
        fresh += tl.sum(is_new)
    tl.store(new + owner * tl.num_programs(1) + part, fresh)


@triton.jit
def _ask(  # type: ignore[no-untyped-def]
    block, slots, tokens, ranks, of_each, blocks, ends, kv_heads, room, most, share,
    LISTED: tl.constexpr, PARTS: tl.constexpr, OWNERS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The block-th ROWS rows of all: which they are, where they belong, and which of them there are."""
    owner = tl.sum((ends <= block).to(tl.int32))
    mine = tl.arange(0, OWNERS) == owner
    count = tl.sum(tl.where(mine, of_each, 0))  # of no owner behind the last block
    rank = (block - tl.sum(tl.where(mine, ends - blocks, 0))) * ROWS + tl.arange(0, ROWS)
    there, kv = rank < count, owner // PARTS
    first = kv.to(tl.int64) * most
    listed = first + owner % PARTS * share + rank
    slot = tl.load(slots + kv // kv_heads, mask=count > 0, other=0).to(tl.int64)
    token = tl.load(tokens + listed, mask=there, other=0)
    target = listed
    if LISTED:
        target = first + tl.load(ranks + listed, mask=there, other=0)
    return (slot * kv_heads + kv % kv_heads) * room + token, target, there


@triton.jit
def _gather(  # type: ignore[no-untyped-def]
    store, slots, tokens, ranks, numbers, rows, owners, kv_heads, room, most, share, size: tl.constexpr,
    LISTED: tl.constexpr, PARTS: tl.constexpr, OWNERS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Copies selected rows, or with LISTED those that are listed by rank, block by block: a link likes ascending runs.

    Programs take blocks in order, so that all are near each other. Each has the next block's rows on their way, and
    knows which those of the one after are, when it writes a block. size is a constant, without which a block was loaded
    row by row.
    """
    after_previous(EARLY)
    program, programs, each = tl.program_id(0), tl.num_programs(0), tl.arange(0, OWNERS)
    of_each = tl.load(numbers + each, mask=each < owners, other=0).to(tl.int32)
    blocks = tl.cdiv(of_each, ROWS)
    ends, total, at = tl.cumsum(blocks, axis=0), tl.sum(blocks), tl.arange(0, WIDE)[None, :]
    inside = at < size
    token, target, there = _ask(
        program, slots, tokens, ranks, of_each, blocks, ends, kv_heads, room, most, share, LISTED, PARTS, OWNERS, ROWS,
    )  # fmt: skip
    part = tl.load(store + token[:, None] * size + at, mask=there[:, None] & inside)
    token, next_target, is_next = _ask(
        program + programs, slots, tokens, ranks, of_each, blocks, ends, kv_heads, room, most, share,
        LISTED, PARTS, OWNERS, ROWS,
    )  # fmt: skip
    # Two blocks in turn: to move one that is on its way, from one name to another, would be to wait for it.
    for block in tl.range(program + 2 * programs, total + 2 * programs, 2 * programs):
        next_part = tl.load(store + token[:, None] * size + at, mask=is_next[:, None] & inside)
        token, later_target, is_later = _ask(
            block, slots, tokens, ranks, of_each, blocks, ends, kv_heads, room, most, share,
            LISTED, PARTS, OWNERS, ROWS,
        )  # fmt: skip
        tl.store(rows + target[:, None] * size + at, part, mask=there[:, None] & inside)
        part = tl.load(store + token[:, None] * size + at, mask=is_later[:, None] & inside)
        target, there = later_target, is_later
        token, later_target, is_later = _ask(
            block + programs, slots, tokens, ranks, of_each, blocks, ends, kv_heads, room, most, share,
            LISTED, PARTS, OWNERS, ROWS,
        )  # fmt: skip
        tl.store(rows + next_target[:, None] * size + at, next_part, mask=is_next[:, None] & inside)
        next_target, is_next = later_target, is_later


@triton.jit
def _put(  # type: ignore[no-untyped-def]
    rows, kept, slots, counts, given, kv_heads, most, kept_room, size,
    ROWS: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Puts rows of a KV head where they are kept."""
    after_previous(EARLY)
    owner, at = tl.program_id(0), tl.arange(0, WIDE)[None, :]
    head = tl.load(slots + owner // kv_heads).to(tl.int64) * kv_heads + owner % kv_heads
    count = tl.load(counts + owner).to(tl.int32)
    for first in tl.range(tl.program_id(1) * ROWS, count, tl.num_programs(1) * ROWS):
        rank = owner.to(tl.int64) * most + first + tl.arange(0, ROWS)
        place = tl.load(given + rank, mask=first + tl.arange(0, ROWS) < count, other=-1).to(tl.int64)
        keeps = (place >= 0)[:, None] & (at < size)
        part = tl.load(rows + rank[:, None] * size + at, mask=keeps, other=0.0)
        tl.store(kept + (head * kept_room + place)[:, None] * size + at, part, mask=keeps)


@triton.jit
def _renew(  # type: ignore[no-untyped-def]
    where, tokens, order, hits, notes, slots, selected, counts, known_places, given_places,
    kv_heads, room, most, size, all_notes, TOKENS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program for a KV head: marks what was here, passes over the rest by age, gives places to what is new."""
    after_previous(EARLY)
    program, at = tl.program_id(0), tl.arange(0, TOKENS)
    owner = tl.load(slots + program // kv_heads).to(tl.int64) * kv_heads + program % kv_heads
    count = tl.load(counts + program).to(tl.int32)
    asked = program.to(tl.int64) * most
    theirs, mine, chosen, given = where + owner * room, owner * size, selected + asked, given_places + asked
    known = known_places + asked
    marks = notes + program * size  # whether the row in a place is read now
    spares = marks + all_notes  # the places that new rows take
    for first in tl.range(0, size, TOKENS):
        tl.store(marks + first + at, 0, mask=first + at < size)
    tl.debug_barrier()
    found = 0
    for first in tl.range(0, count, TOKENS):
        meant = first + at < count
        place = tl.load(known + first + at, mask=meant, other=-1)
        tl.store(marks + place, 1, mask=place >= 0)
        found += tl.sum((place >= 0).to(tl.int32))
    kept = tl.minimum(count, size) - found
    tl.debug_barrier()
    passed = 0
    for first in tl.range(0, size, TOKENS):
        inside = first + at < size
        place = tl.load(order + mine + first + at, mask=inside, other=0)
        unused = (tl.load(marks + place, mask=inside, other=1) == 0).to(tl.int32)
        rank = passed + tl.cumsum(unused, axis=0) - 1
        tl.debug_barrier()  # this block of the order has been read before it is written
        tl.store(spares + rank, place, mask=(unused > 0) & (rank < kept))
        tl.store(order + mine + rank - kept, place, mask=(unused > 0) & (rank >= kept))
        passed += tl.sum(unused)
    tl.debug_barrier()
    latest = order + mine + size - found - kept
    hits_before, new_before = 0, 0
    for first in tl.range(0, count, TOKENS):
        meant = first + at < count
        its = tl.load(chosen + first + at, mask=meant, other=0)
        place = tl.load(known + first + at, mask=meant, other=-1)
        is_here, is_new = meant & (place >= 0), meant & (place < 0)
        both = is_here.to(tl.int32) + (is_new.to(tl.int32) << 16)  # two counts in one: TOKENS are fewer than 2^15
        so_far = tl.cumsum(both, axis=0)
        hit_rank, rank = hits_before + (so_far & 0xFFFF) - 1, new_before + (so_far >> 16) - 1
        tl.store(latest + hit_rank, place, mask=is_here)
        keeps = is_new & (rank < kept)
        spare = tl.load(spares + rank, mask=keeps, other=0)
        old = tl.load(tokens + mine + spare, mask=keeps, other=-1)
        tl.store(theirs + old, -1, mask=old >= 0)
        tl.store(theirs + its, spare, mask=keeps)
        tl.store(tokens + mine + spare, its.to(tl.int32), mask=keeps)
        tl.store(latest + found + rank, spare, mask=keeps)
        tl.store(given + first + at, tl.where(keeps, spare, -1), mask=meant)
        all_both = tl.sum(both)
        hits_before += all_both & 0xFFFF
        new_before += all_both >> 16
    tl.store(hits + owner, tl.load(hits + owner) + found)
