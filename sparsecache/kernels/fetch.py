"""Selected rows on the device that attends to them: from where they lie, or from those that are kept on the way."""

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecache.kernels._triton import after_previous, fast, launching, tl, triton, up_to_power
from sparsecache.kernels.decode import attend_first

_LINK = 64  # programs that keep a link to the host busy; more would be in the way of what runs beside them
_LOOKED_UP = 4096  # tokens at a time


class Sources(NamedTuple):
    """Where selected rows come from.

    places: [B, G, N] int32: a place among the kept, from 0 on; -2 - place for a row that is to be kept in a place, that
    of the row longest unused; -1 for one that finds none beside the others of this step. new: [B, G, N] int32, the
    ranks of those that are not among the kept, ascending, of which the first number [B, G] (int32) are meant.
    """

    places: Tensor
    new: Tensor
    number: Tensor


class Recent(NamedTuple):
    """The C rows of each slot and KV head that were fetched, or read, last: of one layer.

    rows: [slots, G, C, 2, D], keys and values; where: [slots, G, T] int32, a token's place among them, or -1; tokens:
    [slots, G, C] int32, what lies in each place, or -1; order: [slots, G, C] int32, the places by their last use, the
    longest ago first; hits: [slots, G] int64, how many of the looked up were here.
    """

    rows: Tensor
    where: Tensor
    tokens: Tensor
    order: Tensor
    hits: Tensor

    def look_up(self, slots: Tensor, selected: Tensor, counts: Tensor) -> Sources:
        """Where each selected row is to come from, and is to be kept: whoever asks must `gather` them then.

        slots: [B]; selected: [B, G, N] int64, of which the first counts [B, G] are meant, none twice.
        """
        if fast(selected):
            return self._looked_up(slots, selected, counts)
        size, heads = self.tokens.shape[2], torch.arange(selected.shape[1], device=slots.device)
        index = (slots[:, None], heads)
        meant = torch.arange(selected.shape[2], device=slots.device) < counts[..., None]
        where = self.where[index].long()
        place = where.gather(2, selected.masked_fill(~meant, 0)).masked_fill(~meant, -1)
        hit, new = place >= 0, meant & (place < 0)
        found, kept = hit.sum(2), torch.minimum(new.sum(2), size - hit.sum(2))

        order = self.order[index].long()
        used = torch.zeros(*order.shape[:2], size + 1, dtype=torch.bool, device=slots.device)
        used = used.scatter(2, place.masked_fill(~hit, size), True)[..., :-1].gather(2, order)
        order = order.gather(2, used.int().argsort(dim=-1, stable=True))  # the unused, the longest first; then the used
        rank = new.cumsum(2) - 1
        keeps = new & (rank < kept[..., None])
        spare = order.gather(2, rank.clamp(0, size - 1))
        sources = torch.where(hit, place, torch.where(keeps, -2 - spare, -1))

        # A column more, for what is not meant.
        where, tokens = (torch.cat((x, x[..., :1]), 2) for x in (where, self.tokens[index].long()))
        there = spare.masked_fill(~keeps, size)
        old = tokens.gather(2, there)
        where.scatter_(2, old.masked_fill(~keeps | (old < 0), where.shape[2] - 1), -1)
        where.scatter_(2, selected.masked_fill(~keeps, where.shape[2] - 1), spare)
        tokens.scatter_(2, there, selected)
        self.where[index], self.tokens[index] = where[..., :-1].int(), tokens[..., :-1].int()

        unused = torch.arange(size, device=slots.device) - kept[..., None]
        unused = unused.masked_fill((unused < 0) | (unused >= (size - found - kept)[..., None]), size)
        first_hit, first_new = (size - found - kept)[..., None], (size - kept)[..., None]
        places = (
            unused,
            (first_hit + hit.cumsum(2) - 1).masked_fill(~hit, size),
            (first_new + rank).masked_fill(~keeps, size),
        )
        latest = order.new_zeros(*order.shape[:2], size + 1)
        latest.scatter_(2, torch.cat(places, 2), torch.cat((order, place, spare), 2))
        self.order[index] = latest[..., :-1].int()
        self.hits[index] += found
        return Sources(sources.int(), (~new).int().argsort(dim=-1, stable=True).int(), new.sum(2).int())

    def _looked_up(self, slots: Tensor, selected: Tensor, counts: Tensor) -> Sources:
        batch, kv_heads, most = selected.shape
        size = self.tokens.shape[2]
        told = torch.empty((2, batch, kv_heads, most), device=slots.device, dtype=torch.int32)
        number = torch.empty((batch, kv_heads), device=slots.device, dtype=torch.int32)
        sources = Sources(told[0], told[1], number)
        notes = torch.empty((2, batch, kv_heads, size), device=slots.device, dtype=torch.int32)
        tokens = min(_LOOKED_UP, up_to_power(max(size, most), 128))
        _look_up[(batch * kv_heads,)](
            *self[1:], notes, slots, selected.contiguous(), counts.contiguous(), *sources,
            kv_heads, self.where.shape[2], most, size, batch * kv_heads * size,
            TOKENS=tokens, num_warps=max(4, tokens // 256), num_stages=1, **launching(),
        )  # fmt: skip
        return sources

    def read(self, slots: Tensor, places: Tensor, rows: Tensor) -> Tensor:
        """Rows [B, G, N, 2, D] that were fetched, with those that are here in their place; keeps what is to be kept."""
        owner = [x.expand(places.shape) for x in (slots[:, None, None], _heads(places)[:, None])]
        rows = torch.where((places >= 0)[..., None, None], self.rows[*owner, places.clamp(min=0).long()], rows)
        keeps = places < -1
        self.rows[owner[0][keeps], owner[1][keeps], -2 - places[keeps].long()] = rows[keeps]
        return rows


def gather(
    store: Tensor,
    slots: Tensor,
    selected: Tensor,
    counts: Tensor,
    recent: Recent | None = None,
    sources: Sources | None = None,
) -> Tensor:
    """The rows that attend_selected would read of store [slots, G, T, 2, D], keys and values: [B, G, N, 2, D].

    store may lie in pinned host memory, all else on the GPU. Rows from counts [B, G] on are undefined. recent, sources:
    what is kept of the store, and where it said that the rows are to come from.
    """
    batch, kv_heads, most = selected.shape
    if fast(selected):
        rows = torch.empty((batch, kv_heads, most, *store.shape[3:]), device=selected.device, dtype=store.dtype)
        size, room, splits = 2 * store.shape[4], store.shape[2], max(1, _LINK // (batch * kv_heads))
        selected, counts = selected.contiguous(), counts.contiguous()
        kept, asked, copies = rows, (selected, selected, counts), 0
        if recent is not None and sources is not None:
            kept, asked, copies = recent.rows, sources, splits
        _gather[(batch * kv_heads, splits + copies)](
            store, slots, selected, counts, rows, kept, *asked, kv_heads, room, size, most, kept.shape[2],
            KEPT=copies > 0, TOKENS=16, WIDE=up_to_power(size), SPLITS=splits, num_warps=4, **launching(),
        )  # fmt: skip
        return rows
    held = torch.arange(most, device=selected.device) < counts[..., None]
    fetched = store[slots[:, None, None], _heads(selected)[:, None], selected.masked_fill(~held, 0)]
    rows = torch.where(held[..., None, None], fetched, 0)
    return rows if recent is None or sources is None else recent.read(slots, sources.places, rows)


def attend_gathered(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """attend_selected over rows [B, G, N, 2, D] that `gather` fetched."""
    return attend_first(q, k, v, rows[..., 0, :], rows[..., 1, :], counts)


def _heads(selected: Tensor) -> Tensor:
    return torch.arange(selected.shape[1], device=selected.device)


@triton.jit
def _gather(  # type: ignore[no-untyped-def]
    store, slots, selected, counts, rows, kept, places, new, number, kv_heads, room, size, most, kept_room,
    KEPT: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Copies a part of a KV head's selected rows, in order: ascending rows are what a link to the host likes.

    With KEPT, the first SPLITS programs copy those that are new, and the others those that are among the kept.
    """
    after_previous(EARLY)
    row, kv, split = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads, tl.program_id(1)
    owner = tl.load(slots + row).to(tl.int64) * kv_heads + kv
    at, asked = tl.arange(0, WIDE)[None, :], tl.program_id(0) * most
    source, mine = store + owner * room * size + at, kept + owner * kept_room * size + at
    target = rows + asked.to(tl.int64) * size + at
    if split < SPLITS:
        count = tl.load((number if KEPT else counts) + tl.program_id(0)).to(tl.int32)
        for first in tl.range(split * TOKENS, count, SPLITS * TOKENS):
            rank = first + tl.arange(0, TOKENS)
            there = rank < count
            seen = there[:, None] & (at < size)
            if KEPT:
                rank = tl.load(new + asked + rank, mask=there, other=0)
            token = tl.load(selected + asked + rank, mask=there, other=0)
            part = tl.load(source + token[:, None] * size, mask=seen, other=0.0)
            tl.store(target + rank.to(tl.int64)[:, None] * size, part, mask=seen)
            if KEPT:
                place = -2 - tl.load(places + asked + rank, mask=there, other=-1).to(tl.int64)
                tl.store(mine + place[:, None] * size, part, mask=seen & (place >= 0)[:, None])
    elif KEPT:
        count = tl.load(counts + tl.program_id(0)).to(tl.int32)
        for first in tl.range((split - SPLITS) * TOKENS, count, SPLITS * TOKENS):
            rank = first + tl.arange(0, TOKENS)
            place = tl.load(places + asked + rank, mask=rank < count, other=-1).to(tl.int64)
            seen = (place >= 0)[:, None] & (at < size)
            part = tl.load(mine + place[:, None] * size, mask=seen, other=0.0)
            tl.store(target + rank.to(tl.int64)[:, None] * size, part, mask=seen)


@triton.jit
def _look_up(  # type: ignore[no-untyped-def]
    where, tokens, order, hits, notes, slots, selected, counts, sources, new, number,
    kv_heads, room, most, size, all_notes,
    TOKENS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program for a KV head: marks what is here, passes over the rest by age, gives places to what is new."""
    after_previous(EARLY)
    program, at = tl.program_id(0), tl.arange(0, TOKENS)
    owner = tl.load(slots + program // kv_heads).to(tl.int64) * kv_heads + program % kv_heads
    count = tl.load(counts + program).to(tl.int32)
    places, mine, asked = where + owner * room, owner * size, program.to(tl.int64) * most
    marks = notes + program * size  # whether the row in a place is read now
    spares = marks + all_notes  # the places that new rows take
    for first in tl.range(0, size, TOKENS):
        tl.store(marks + first + at, 0, mask=first + at < size)
    tl.debug_barrier()
    found = 0
    for first in tl.range(0, count, TOKENS):
        meant = first + at < count
        token = tl.load(selected + asked + first + at, mask=meant, other=0)
        place = tl.load(places + token, mask=meant, other=-1)
        tl.store(sources + asked + first + at, place, mask=meant)
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
    hits_before, new_before = 0, 0
    for first in tl.range(0, count, TOKENS):
        meant = first + at < count
        token = tl.load(selected + asked + first + at, mask=meant, other=0).to(tl.int32)
        place = tl.load(sources + asked + first + at, mask=meant, other=-1)
        is_here = (place >= 0).to(tl.int32)
        is_new = meant.to(tl.int32) - is_here
        rank = new_before + tl.cumsum(is_new, axis=0) - 1
        tl.store(new + asked + rank, first + at, mask=is_new > 0)
        later = order + mine + size - found - kept
        tl.store(later + hits_before + tl.cumsum(is_here, axis=0) - 1, place, mask=place >= 0)
        keeps = (is_new > 0) & (rank < kept)
        spare = tl.load(spares + rank, mask=keeps, other=0)
        old = tl.load(tokens + mine + spare, mask=keeps, other=-1)
        tl.store(places + old, -1, mask=old >= 0)
        tl.store(places + token, spare, mask=keeps)
        tl.store(tokens + mine + spare, token, mask=keeps)
        tl.store(later + found + rank, spare, mask=keeps)
        tl.store(sources + asked + first + at, -2 - spare, mask=keeps)
        hits_before += tl.sum(is_here)
        new_before += tl.sum(is_new)
    tl.store(number + program, count - found)
    tl.store(hits + owner, tl.load(hits + owner) + found)
