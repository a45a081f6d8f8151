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
        for name, size in {"_LOOKED_UP": 16, "_LINK": 2, "_ROWS": 8, "_COPY": 4}.items():
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
def test_what_is_found_is_what_a_textbook_lru_holds(case, which, device) -> None:
    recent, found, held = _recent(case, device), 0, {}
    for order, selected, counts in _selections(case, 9):
        with running(which):
            sources = recent.look_up(order.to(device), selected.to(device), counts.to(device))
        for row, slot in enumerate(order.tolist()):
            for kv in range(case[1]):
                cache = held.setdefault((slot, kv), OrderedDict())  # token to place, the least recently used first
                meant = selected[row, kv, : counts[row, kv]].tolist()
                hits = [token for token in meant if token in cache]
                for token in hits:
                    cache.move_to_end(token)
                free = sorted(set(range(case[3])) - set(cache.values()))
                new = [token for token in meant if token not in hits]
                told = dict(zip(meant, sources.places[row, kv].tolist(), strict=False))
                assert [meant[rank] for rank in sources.ranks[row, kv, : len(meant)].tolist()] == new + hits
                assert int(sources.new[row, kv]) == len(new)
                places = case[3] - len(hits)
                for token in new[:places]:
                    cache[token] = free.pop(0) if free else cache.popitem(last=False)[1]
                assert told == {token: cache.get(token, -1) for token in meant}
                found += len(hits)
    assert int(recent.hits.sum()) == found > 0


@cases
def test_every_step_leaves_what_its_twin_leaves(case, device, agree) -> None:
    recent = _recent(case, device)
    for order, selected, counts in _selections(case, 6):
        order, selected, counts = (x.to(device) for x in (order, selected, counts))

        def look_up(where, tokens, ages, hits, *asked):
            _, places, ranks, new = Recent(recent.rows, where, tokens, ages, hits).look_up(*asked)
            meant = torch.arange(places.shape[2], device=device) < asked[2][..., None]
            return places.where(meant, 0), ranks.where(meant, 0), new

        agree(look_up, *recent[1:], order, selected, counts)
        recent.look_up(order, selected, counts)


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
            sources = recent.look_up(order, selected, counts)
            rows, places = gather(gone, order, selected, counts, sources)
        assert (places is None) == (case[3] < most)
        found = rows[meant] if places is None else rows[slot[meant], head[meant], places[meant].long()]
        assert torch.equal(found, store[slot[meant], head[meant], selected[meant]])


@pytest.mark.parametrize("kept", [None, 40, 131])
@pytest.mark.parametrize("most", [1, 130])
def test_fetched_rows_are_attended_to(most, kept, device, dtype, agree) -> None:
    """Fetched in one kernel, attended to in the next: as attending to them where they lie."""
    slots, kv_heads, group, head_dim, room, batch = 3, 2, 4, 32, 200, 2
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q, k, v = draw(batch, kv_heads * group, 1, head_dim), *draw(2, batch, kv_heads, 1, head_dim)
    store = draw(slots, kv_heads, room, 2, head_dim)
    order = torch.tensor([2, 0], device=device)
    selected = torch.rand(batch, kv_heads, room, generator=generator).argsort(-1)[..., :most].contiguous().to(device)
    counts = torch.randint(0, most + 1, (batch, kv_heads), generator=generator).to(device)
    counts[0, 0] = most

    def fetched(q, k, v, store, order, selected, counts):
        if kept is None:
            return gather(store, order, selected, counts).attend(q, k, v, order, counts)
        recent = _recent((slots, kv_heads, room, kept, most), device, head_dim, dtype)
        for _ in range(2):
            sources = recent.look_up(order, selected, counts)
            rows = gather(store, order, selected, counts, sources)
        return rows.attend(q, k, v, order, counts)

    agree(fetched, q, k, v, store, order, selected, counts)
    with running("twins"):
        there = attend_selected(q, k, v, store[..., 0, :], store[..., 1, :], order, selected, counts)
        here = fetched(q, k, v, store, order, selected, counts)
    torch.testing.assert_close(here, there)
