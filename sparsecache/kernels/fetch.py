"""Selected rows on the device that attends to them: from where they lie, or from those that are kept on the way."""

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecache.kernels._triton import after_previous, fast, launching, tl, triton, up_to_power
from sparsecache.kernels.decode import attend_first, attend_selected
from sparsecache.kernels.rows import take_rows

# Programs that keep a link to the host busy, and rows that each asks for at a time: other loads of a multiprocessor
# wait behind those from the host, so that few programs with many rows are least in the way.
_LINK, _ROWS, _WARPS = 16, 32, 8
_COPY = 64  # programs that copy what is on the device
_LOOKED_UP = 4096  # tokens at a time


class Fetched(NamedTuple):
    """Selected rows on the device: the first of rows [B, G, N, 2, D], or places [B, G, N] in [slots, G, C, 2, D]."""

    rows: Tensor
    places: Tensor | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, counts: Tensor) -> Tensor:
        """What attend_selected would give where the rows came from."""
        keys, values = self.rows[..., 0, :], self.rows[..., 1, :]
        if self.places is None:
            return attend_first(q, k, v, keys, values, counts)
        return attend_selected(q, k, v, keys, values, slots, self.places, counts)


class Sources(NamedTuple):
    """Where selected rows come from.

    kept: [slots, G, C, 2, D], the rows of a `Recent`. places: [B, G, N] int32, where each is there, or -1. ranks:
    [B, G, N] int32, which of the selected were not there yet, ascending, and then which were. new: [B, G] int32, how
    many were not.
    """

    kept: Tensor
    places: Tensor
    ranks: Tensor
    new: Tensor

    def read(self, slots: Tensor, rows: Tensor) -> Tensor:
        """Rows [B, G, N, 2, D] that were fetched, with those that were here in their place; keeps what is to be kept.

        Of those that were here, anything may have been fetched.
        """
        slot, head = (x.expand(self.places.shape) for x in (slots[:, None, None], _heads(rows)[:, None]))
        is_new = torch.arange(rows.shape[2], device=rows.device) < self.new[..., None]
        is_new = torch.zeros_like(is_new).scatter(2, self.ranks.long(), is_new)
        places = self.places.long()
        found, keeps = (places >= 0) & ~is_new, (places >= 0) & is_new
        rows = torch.where(found[..., None, None], self.kept[slot, head, places.clamp(min=0)], rows)
        self.kept[slot[keeps], head[keeps], places[keeps]] = rows[keeps]
        return rows


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
        """Finds places for selected rows; whoever asks must then `gather` them.

        Rows that are here stay; new ones take the places that are longest unused, as long as there are any that this
        step does not read. slots: [B]; selected: [B, G, N] int64, of which the first counts [B, G] are meant, none
        twice.
        """
        if fast(selected):
            return self._looked_up(slots, selected, counts)
        size, device = self.tokens.shape[2], slots.device
        index = (slots[:, None], _heads(selected))
        meant = torch.arange(selected.shape[2], device=device) < counts[..., None]
        where = self.where[index].long()
        place = where.gather(2, selected.masked_fill(~meant, 0)).masked_fill(~meant, -1)
        hit, new = place >= 0, meant & (place < 0)
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
        ranks = (2 * ~meant + hit).int().argsort(dim=-1, stable=True)  # the new, the found, the rest
        return Sources(self.rows, torch.where(keeps, spare, place).int(), ranks.int(), new.sum(2).int())

    def _looked_up(self, slots: Tensor, selected: Tensor, counts: Tensor) -> Sources:
        batch, kv_heads, most = selected.shape
        size = self.tokens.shape[2]
        told = torch.empty((2, batch, kv_heads, most), device=slots.device, dtype=torch.int32)
        new = torch.empty((batch, kv_heads), device=slots.device, dtype=torch.int32)
        notes = torch.empty((2, batch, kv_heads, size), device=slots.device, dtype=torch.int32)
        tokens = min(_LOOKED_UP, up_to_power(max(size, most), 128))
        _look_up[(batch * kv_heads,)](
            *self[1:], notes, slots, selected.contiguous(), counts.contiguous(), told, new,
            kv_heads, self.where.shape[2], most, size, batch * kv_heads * size, batch * kv_heads * most,
            TOKENS=tokens, num_warps=max(4, tokens // 256), num_stages=1, **launching(),
        )  # fmt: skip
        return Sources(self.rows, told[0], told[1], new)


def gather(store: Tensor, slots: Tensor, selected: Tensor, counts: Tensor, sources: Sources | None = None) -> Fetched:
    """The rows that attend_selected would read of store [slots, G, T, 2, D], keys and values.

    store may lie in pinned host memory, all else on the GPU. sources: where a `Recent` of the store said that they are
    to come from; where it has a place for each, that is where they are then attended to.
    """
    batch, kv_heads, most = selected.shape
    in_place = sources is not None and sources.kept.shape[2] >= most
    if fast(selected):
        rows = torch.empty(
            (batch, kv_heads, 0 if in_place else most, *store.shape[3:]), device=selected.device, dtype=store.dtype
        )
        selected, counts = selected.contiguous(), counts.contiguous()
        asked = sources or (rows, selected, selected, counts)
        heads = min(batch * kv_heads, _LINK)
        splits, copies = _LINK // heads, 0 if sources is None or in_place else -(-_COPY // heads)
        _gather[(heads, splits + copies)](
            store, slots, selected, counts, rows, *asked, batch * kv_heads, kv_heads, store.shape[2],
            2 * store.shape[4], most, asked[0].shape[2], KEPT=sources is not None, IN_PLACE=in_place, ROWS=_ROWS,
            WIDE=up_to_power(2 * store.shape[4]), SPLITS=splits, COPIES=copies, num_warps=_WARPS, **launching(),
        )  # fmt: skip
    else:
        held = torch.arange(most, device=selected.device) < counts[..., None]
        fetched = take_rows(store, slots, selected.masked_fill(~held, 0))
        rows = torch.where(held[..., None, None], fetched, 0)
        if sources is not None:
            rows = sources.read(slots, rows)
    return Fetched(sources.kept, sources.places) if sources is not None and in_place else Fetched(rows, None)


def _heads(selected: Tensor) -> Tensor:
    return torch.arange(selected.shape[1], device=selected.device)


@triton.jit
def _gather(  # type: ignore[no-untyped-def]
    store, slots, selected, counts, rows, kept, places, ranks, new, owners, kv_heads, room, size, most, kept_room,
    KEPT: tl.constexpr, IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr, COPIES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Copies selected rows, KV head by KV head, as selected: ascending runs are what a link to the host likes.

    With KEPT, the first SPLITS programs of each head take the new ones, and the others, if any, those that were kept.
    """
    after_previous(EARLY)
    split, at = tl.program_id(1), tl.arange(0, WIDE)[None, :]
    for owner in tl.range(tl.program_id(0), owners, tl.num_programs(0)):
        head = tl.load(slots + owner // kv_heads).to(tl.int64) * kv_heads + owner % kv_heads
        source, mine = store + head * room * size + at, kept + head * kept_room * size + at
        asked = tl.zeros((), dtype=tl.int64) + owner * most
        target = rows + asked * size + at
        begin, count, apart = split * ROWS, tl.load(counts + owner).to(tl.int32), SPLITS * ROWS
        fresh = count  # of those it takes, how many come from the store
        if KEPT:
            fresh = tl.load(new + owner)
            if split < SPLITS:
                count = fresh
            else:
                begin, apart = fresh + (split - SPLITS) * ROWS, COPIES * ROWS
        for first in tl.range(begin, count, apart):
            rank = first + tl.arange(0, ROWS)
            there = rank < count
            seen = there[:, None] & (at < size)
            is_new = (rank < fresh)[:, None] & seen
            if KEPT:
                rank = tl.load(ranks + asked + rank, mask=there, other=0)
                place = tl.load(places + asked + rank, mask=there, other=-1).to(tl.int64)[:, None]
            token = tl.load(selected + asked + rank, mask=there, other=0)
            part = tl.load(source + token[:, None] * size, mask=is_new, other=0.0)
            if KEPT:
                tl.store(mine + place * size, part, mask=is_new & (place >= 0))
            if not IN_PLACE:
                if KEPT:
                    part = tl.where(is_new, part, tl.load(mine + place * size, mask=seen & ~is_new, other=0.0))
                tl.store(target + rank.to(tl.int64)[:, None] * size, part, mask=seen)


@triton.jit
def _look_up(  # type: ignore[no-untyped-def]
    where, tokens, order, hits, notes, slots, selected, counts, places, new,
    kv_heads, room, most, size, all_notes, all_places, TOKENS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program for a KV head: marks what is here, passes over the rest by age, gives places to what is new."""
    after_previous(EARLY)
    program, at = tl.program_id(0), tl.arange(0, TOKENS)
    owner = tl.load(slots + program // kv_heads).to(tl.int64) * kv_heads + program % kv_heads
    count = tl.load(counts + program).to(tl.int32)
    asked = program.to(tl.int64) * most
    theirs, mine, chosen, given = where + owner * room, owner * size, selected + asked, places + asked
    ranks = given + all_places
    marks = notes + program * size  # whether the row in a place is read now
    spares = marks + all_notes  # the places that new rows take
    for first in tl.range(0, size, TOKENS):
        tl.store(marks + first + at, 0, mask=first + at < size)
    tl.debug_barrier()
    found = 0
    for first in tl.range(0, count, TOKENS):
        meant = first + at < count
        place = tl.load(theirs + tl.load(chosen + first + at, mask=meant, other=0), mask=meant, other=-1)
        tl.store(given + first + at, place, mask=meant)
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
        place = tl.load(given + first + at, mask=meant, other=-1)
        is_here, is_new = meant & (place >= 0), meant & (place < 0)
        both = is_here.to(tl.int32) + (is_new.to(tl.int32) << 16)  # two counts in one: TOKENS are fewer than 2^15
        so_far = tl.cumsum(both, axis=0)
        hit_rank, rank = hits_before + (so_far & 0xFFFF) - 1, new_before + (so_far >> 16) - 1
        tl.store(ranks + rank, first + at, mask=is_new)
        tl.store(ranks + count - found + hit_rank, first + at, mask=is_here)
        tl.store(latest + hit_rank, place, mask=is_here)
        keeps = is_new & (rank < kept)
        token = tl.load(chosen + first + at, mask=keeps, other=0).to(tl.int32)
        spare = tl.load(spares + rank, mask=keeps, other=0)
        old = tl.load(tokens + mine + spare, mask=keeps, other=-1)
        tl.store(theirs + old, -1, mask=old >= 0)
        tl.store(theirs + token, spare, mask=keeps)
        tl.store(tokens + mine + spare, token, mask=keeps)
        tl.store(latest + found + rank, spare, mask=keeps)
        tl.store(given + first + at, spare, mask=keeps)
        all_both = tl.sum(both)
        hits_before += all_both & 0xFFFF
        new_before += all_both >> 16
    tl.store(new + program, count - found)
    tl.store(hits + owner, tl.load(hits + owner) + found)
