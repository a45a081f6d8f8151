"""Rows fetched in one kernel and attended to in the next; those fetched before are found as in a textbook LRU cache."""

from collections import OrderedDict

import pytest
import torch

from sparsecache.kernels import fetch
from sparsecache.kernels._triton import running
from sparsecache.kernels.decode import attend_selected
from sparsecache.kernels.fetch import Recent, gather

CASES = {  # slots, KV heads, room, places, most selected at a time
    "one place": (2, 1, 20, 1, 5),
    "fewer places than are selected": (3, 2, 50, 7, 20),
    "as many": (2, 3, 130, 64, 64),
    "places for everything": (1, 2, 40, 40, 40),
}
if torch.cuda.is_available():
    CASES |= {"several blocks": (2, 8, 9000, 5000, 3001), "more than a block is new": (1, 4, 70_001, 3000, 7003)}
    CASES |= {"a full batch": (16, 8, 900, 200, 128)}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True, params=["blocks as they are", "small blocks"])
def _blocks(request, monkeypatch) -> None:
    """Small ones make every loop of the kernels go round: over blocks, and over more KV heads than programs."""
    if request.param == "small blocks":
        for name, size in {"_FOUND": 16, "_RENEWED": 16, "_LINK": 2, "_ROWS": 8, "_COPY": 4}.items():
            monkeypatch.setattr(fetch, name, size)


def _recent(case, device, head_dim=16, dtype=torch.float32) -> Recent:
    slots, kv_heads, room, places, _ = case

    def of(*size: int, fill: int = -1) -> torch.Tensor:
        return torch.full((slots, kv_heads, *size), fill, dtype=torch.int32, device=device)

    order = torch.arange(places, dtype=torch.int32, device=device).expand(slots, kv_heads, -1).contiguous()
    rows = torch.full((slots, kv_heads, places, 2, head_dim), 100.0, device=device, dtype=dtype)  # nothing

    return Recent(rows, of(room), of(places), order, torch.zeros(slots, kv_heads, dtype=torch.int64, device=device))


def _selections(case, steps: int):
    """For each step the slots, and what their heads select, many as in the step before: in two ascending runs."""
    slots, kv_heads, room, _, most = case
    generator = torch.Generator().manual_seed(3)
    liked = torch.rand(slots, kv_heads, room, generator=generator)
    for step in range(steps):
        order = torch.randperm(slots, generator=generator)[: 1 + step % slots]
        liked += torch.rand(liked.shape, generator=generator) * 0.3
        counts = torch.randint(0, most + 1, (len(order), kv_heads), generator=generator)
        chosen = liked[order].topk(most).indices
        ranks = torch.arange(most)
        chosen = chosen.masked_fill(ranks >= counts[..., None], room)
        late = torch.rand(chosen.shape, generator=generator) < 0.3  # in the step of the cut
        run = torch.where(chosen == room, 2, late.long())
        chosen = chosen.gather(-1, (chosen + room * run).argsort(-1))
        yield order, chosen.masked_fill(chosen == room, 0), counts


@cases
@pytest.mark.parametrize("which", ["kernels", "twins"])
def test_what_is_kept_is_what_a_textbook_lru_holds(case, which, device) -> None:
    slots, kv_heads, room, size, _ = case
    recent, found, held = _recent(case, device), 0, {}
    store = torch.randn(slots, kv_heads, room, 2, 16, generator=torch.Generator().manual_seed(1))
    for order, selected, counts in _selections(case, 9):
        rows = store[order[:, None, None], torch.arange(kv_heads)[:, None], selected]
        with running(which):
            asked = order.to(device), selected.to(device), counts.to(device)
            recent.keep(*asked, recent.find(*asked).places, rows.to(device))
        for row, slot in enumerate(order.tolist()):
            for kv in range(kv_heads):
                cache = held.setdefault((slot, kv), OrderedDict())  # token to place, the least recently used first
                meant = selected[row, kv, : counts[row, kv]].tolist()
                hits = [token for token in meant if token in cache]
                for token in hits:
                    cache.move_to_end(token)
                free = sorted(set(range(size)) - set(cache.values()))
                for token in [token for token in meant if token not in hits][: size - len(hits)]:
                    cache[token] = free.pop(0) if free else cache.popitem(last=False)[1]
                found += len(hits)
        for (slot, kv), cache in held.items():
            tokens, places = list(cache), list(cache.values())
            where, lies, kept = (x[slot, kv].cpu() for x in (recent.where, recent.tokens, recent.rows))
            expected = torch.full_like(where, -1)
            expected[tokens] = torch.tensor(places, dtype=torch.int32)
            assert torch.equal(where, expected) and lies[places].tolist() == tokens
            assert torch.equal(kept[places], store[slot, kv, tokens])
    assert int(recent.hits.sum()) == found > 0


@cases
def test_every_step_leaves_what_its_twin_leaves(case, device, agree) -> None:
    recent = _recent(case, device)
    for order, selected, counts in _selections(case, 6):
        order, selected, counts = (x.to(device) for x in (order, selected, counts))
        rows = torch.randn(*selected.shape, *recent.rows.shape[3:]).to(device)

        def step(order, selected, counts, rows, *kept):
            recent = Recent(*kept)
            places, ranks, tokens, new = recent.find(order, selected, counts)
            recent.keep(order, selected, counts, places, rows)
            share = -(-case[4] // new.shape[2])
            rank = torch.arange(case[4], device=device)
            listed = rank % share < new.repeat_interleave(share, 2)[..., : case[4]]
            return places.where(rank < counts[..., None], 0), ranks.where(listed, 0), tokens.where(listed, 0), new

        agree(step, order, selected, counts, rows, *recent)
        recent.keep(order, selected, counts, recent.find(order, selected, counts).places, rows)


@cases
@pytest.mark.parametrize("which", ["kernels", "twins"])
def test_rows_are_the_same_wherever_they_are_read(case, which, device) -> None:
    slots, kv_heads, room, _, most = case
    store = torch.randn(slots, kv_heads, room, 2, 16, generator=torch.Generator().manual_seed(1)).to(device)
    recent = _recent(case, device)
    for order, selected, counts in _selections(case, 6):
        order, selected, counts = (x.to(device) for x in (order, selected, counts))
        with running(which):
            # What is found must not be read from the store: there, it is gone.
            gone, meant = store.clone(), torch.arange(most, device=device) < counts[..., None]
            slot, head = order[:, None, None].expand_as(meant), torch.arange(kv_heads, device=device)[:, None]
            head = head.expand_as(meant)
            here = (recent.where[slot, head, selected] >= 0) & meant
            gone[slot[here], head[here], selected[here]] = torch.nan
            fetched = gather(gone, order, selected, counts, recent)
            read = fetched.kept.merged(fetched.rows, counts)
            fetched.keep(order, selected, counts)
        assert torch.equal(read[meant], store[slot[meant], head[meant], selected[meant]])


@pytest.mark.parametrize("kept", [None, 40, 131])
@pytest.mark.parametrize(("group", "head_dim", "most"), [(4, 32, 1), (4, 32, 130), (1, 128, 130), (8, 64, 130)])
def test_fetched_rows_are_attended_to(group, head_dim, most, kept, device, dtype, agree) -> None:
    """Fetched in one kernel, attended to in the next: as attending to them where they lie."""
    slots, kv_heads, room, batch = 3, 2, 200, 2
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q, k, v = draw(batch, kv_heads * group, 1, head_dim), *draw(2, batch, kv_heads, 1, head_dim)
    store = draw(slots, kv_heads, room, 2, head_dim)
    order = torch.tensor([2, 0], device=device)
    selected = torch.rand(2, batch, kv_heads, room, generator=generator).argsort(-1)[..., :most].contiguous().to(device)
    counts = torch.randint(0, most + 1, (2, batch, kv_heads), generator=generator).to(device)
    counts[:, 0, 0] = most

    def fetched(q, k, v, store, order, selected, counts):
        recent = None
        if kept is not None:  # what another step has left
            recent = _recent((slots, kv_heads, room, kept, most), device, head_dim, dtype)
            before = gather(store, order, selected[0], counts[0], recent)
            before.keep(order, selected[0], counts[0])
        rows = gather(store, order, selected[1], counts[1], recent)
        if recent is not None:  # must be attended to where they are kept
            rows.rows[(rows.kept.places >= 0) & (torch.arange(most, device=device) < counts[1][..., None])] = torch.nan
        return rows.attend(q, k, v, counts[1])

    agree(fetched, q, k, v, store, order, selected, counts)
    with running("twins"):
        there = attend_selected(q, k, v, store[..., 0, :], store[..., 1, :], order, selected[1], counts[1])
        here = fetched(q, k, v, store, order, selected, counts)
    torch.testing.assert_close(here, there)
