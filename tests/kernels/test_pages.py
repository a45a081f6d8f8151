"""Pages of keys: kernels against references, bounds against the keys. tests/methods has the truth of selections."""

import pytest
import torch

from sparsecache.kernels.page_bounds import channel_bounds, store_page_bounds
from sparsecache.kernels.page_selection import list_pages, positions_of_pages, select_pages
from sparsecache.kernels.page_shares import choose_queries, highest_page_shares, page_shares
from sparsecache.kernels.pages import score_bounds, update_newest_page

CASES = {  # slots, KV heads, group, head size, pages allocated, pages scored, slots of the batch
    "one page": (1, 1, 1, 16, 1, 1, [0]),
    "around a block": (3, 2, 3, 24, 40, 33, [2, 0]),
    "wide group": (2, 2, 12, 32, 7, 7, [1, 0]),
}
if torch.cuda.is_available():
    CASES["long"] = (16, 8, 4, 128, 2049, 2047, [*range(15, -1, -1)])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_and_reference_agree(case, device, dtype, agree) -> None:
    slots, kv_heads, group, head_dim, capacity, pages, of_batch = case
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(len(of_batch), kv_heads * group, 1, head_dim, generator=generator).to(device, dtype)
    ends = torch.randn(2, slots, kv_heads, capacity, head_dim, generator=generator).to(device, dtype).sort(0).values
    row_slots = torch.tensor(of_batch, device=device)
    for join_heads in (False, True):
        agree(score_bounds, q, ends[0].clone(), ends[1].clone(), row_slots, pages, join_heads)


def test_no_key_of_a_page_scores_above_its_bound() -> None:
    q, keys = torch.randn(2, 6, 1, 8), torch.randn(2, 3, 5, 4, 8)  # 5 pages of 4 keys
    bounds = score_bounds(q, keys.amin(3), keys.amax(3), torch.arange(2), 5)
    scores = torch.einsum("bghd,bgptd->bghpt", q.view(2, 3, 2, 8), keys)
    assert (scores.amax(4) <= bounds + 1e-5).all()
    alike = keys[:, :, :, :1].expand(-1, -1, -1, 4, -1)  # pages of equal keys: the bound is the score
    bounds = score_bounds(q, alike.amin(3), alike.amax(3), torch.arange(2), 5)
    torch.testing.assert_close(bounds, torch.einsum("bghd,bgpd->bghp", q.view(2, 3, 2, 8), keys[:, :, :, 0]))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize(("length", "page"), [(1, 4), (4, 4), (15, 4), (40, 8), (41, 8)])
def test_a_prompts_bounds_are_those_of_its_pages(length, page, mean) -> None:
    keys = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(3))[:, :length].bfloat16()  # not contiguous
    stored = torch.zeros(2, 2, 13, 6, dtype=torch.bfloat16)
    store_page_bounds(keys, stored[0], stored[1], page, mean)
    for at in range(-(-length // page)):
        tokens = keys[:, at * page : (at + 1) * page]
        bounds = torch.stack(channel_bounds(tokens, torch.ones(tokens.shape[1], dtype=torch.bool), mean))
        torch.testing.assert_close(stored[:, :, at], bounds.bfloat16())
    assert not stored[:, :, -(-length // page) :].any()


UPDATES = {  # tokens in a page, capacity, past tokens of the slots of the batch
    "first tokens": (4, 20, [0, 3, 4]),
    "long pages": (70, 300, [139, 207, 299]),
    "full": (3, 11, [11, 10, 9]),
}


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("case", UPDATES.values(), ids=UPDATES)
def test_the_newest_page_is_bounded(case, mean, device, gpu_dtype, agree) -> None:
    page, capacity, past = case
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(4, 2, capacity, 24, generator=generator).to(device, gpu_dtype)
    bounds = torch.randn(2, 4, 2, -(-capacity // page), 24, generator=generator).to(device, gpu_dtype)
    seq_lens = torch.tensor([0, *past], device=device)
    agree(update_newest_page, keys, *bounds, seq_lens, torch.tensor([2, 1, 3], device=device), page, mean)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("rows", [70, 71, 200])
@pytest.mark.parametrize("past", [[0, 69, 70], [139, 210, 280], [299, 300, 301]])
def test_the_newest_page_is_bounded_from_a_ring_of_the_last_tokens(past, rows, mean, device, gpu_dtype, agree) -> None:
    """As from the keys of all tokens."""
    page, capacity, slots = 70, 300, torch.tensor([2, 1, 3], device=device)
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(4, 2, capacity, 24, generator=generator).to(device, gpu_dtype)
    bounds = torch.randn(2, 4, 2, -(-capacity // page), 24, generator=generator).to(device, gpu_dtype)
    ring = torch.full((4, 2, rows, 24), 9.0, device=device, dtype=gpu_dtype)  # would be the highest
    for slot, count in enumerate(past, start=1):
        stored = torch.arange(min(count, capacity - 1) + 1, device=device)[-rows:]
        ring[slot, :, stored % rows] = keys[slot, :, stored]
    seq_lens = torch.tensor([0, *past], device=device)
    expected = bounds.clone()
    update_newest_page(keys, *expected, seq_lens, slots, page, mean)
    agree(update_newest_page, ring, *bounds, seq_lens, slots, page, mean, capacity)
    update_newest_page(ring, *bounds, seq_lens, slots, page, mean, capacity)
    torch.testing.assert_close(bounds, expected, rtol=0, atol=0)


SELECTIONS = {  # tokens in a page, pages scored, past tokens and budget per row, width
    "one page": (16, 1, [0, 3, 16], [1, 1, 20], 20),
    "around a block": (4, 130, [129, 520, 77], [40, 519, 80], 519),
    "single tokens": (1, 70, [70, 1, 33], [9, 9, 9], 9),
    "long pages": (150, 3, [449, 301, 10], [200, 160, 7], 200),
}
if torch.cuda.is_available():
    SELECTIONS["long"] = (16, 2049, [32_777, 32_768, 5], [1638, 32_000, 1], 32_000)
    SELECTIONS["many pages"] = (8, 16_385, [131_073, 131_072, 77], [6554, 1638, 70], 6554)


@pytest.mark.parametrize("kind", ["distinct", "ties", "not finite", "clustered"])
@pytest.mark.parametrize("case", SELECTIONS.values(), ids=SELECTIONS)
def test_pages_are_selected_as_by_sorting(case, kind, device, agree, monkeypatch) -> None:
    page, pages, past, budget, width = case
    if pages < 1000:
        monkeypatch.setattr("sparsecache.kernels.page_selection._TILE_PAGES", 8)  # several tiles and blocks
    scores = 100 * torch.randn(3, 2, pages, generator=torch.Generator().manual_seed(3)).to(device)
    if kind == "ties":
        scores = (scores / 100).round()  # zeros of both signs too
    if kind == "clustered":  # almost all near 1, so that interpolation needs many steps
        scores = torch.where(scores > 200, 1e30 * scores, 1 + 1e-6 * scores)
    slots = torch.tensor([3, 0, 2], device=device)
    seq_lens = torch.zeros(4, dtype=torch.int64, device=device)
    seq_lens[slots] = torch.tensor(past, device=device)
    num_excluded = torch.zeros_like(seq_lens)
    num_excluded[slots] = seq_lens[slots] - torch.tensor(budget, device=device).clamp(max=width)
    budgets = torch.zeros(max(past) + 1, dtype=torch.int64, device=device)
    budgets[past] = torch.tensor(budget, device=device)

    def select(scores, seq_lens, slots, **options):
        if kind == "not finite":
            scores = scores.clone()
            scores[:, :, ::3], scores[:, :, 1::3] = torch.inf, -torch.inf
        positions, counts = select_pages(scores, seq_lens, slots, page, width, **options)
        assert positions.shape == (3, 2, width)
        return positions.masked_fill(torch.arange(width, device=device) >= counts[..., None], 0), counts

    agree(select, scores, seq_lens, slots, budgets=budgets, force_newest=kind != "distinct")
    agree(select, scores, seq_lens, slots, num_excluded=num_excluded)

    def select_listed(scores, seq_lens, slots, **options):
        if kind == "not finite":
            scores = scores.clone()
            scores[:, :, ::3], scores[:, :, 1::3] = torch.inf, -torch.inf
        listed = list_pages(scores, seq_lens, slots, page, width, **options)
        positions, counts = positions_of_pages(listed, seq_lens[slots])
        assert torch.equal(counts, listed.counts) and (listed.cuts[..., 0] <= listed.pages.shape[2]).all()
        wide = torch.zeros(3, 2, width, dtype=torch.int64, device=device)
        wide[:, :, : positions.shape[2]] = positions
        return wide.masked_fill(torch.arange(width, device=device) >= counts[..., None], 0), counts

    options = {"budgets": budgets, "force_newest": kind != "distinct"}
    agree(select_listed, scores, seq_lens, slots, **options)
    for ours, expected in zip(
        select_listed(scores, seq_lens, slots, **options), select(scores, seq_lens, slots, **options), strict=True
    ):
        assert torch.equal(ours, expected)


def test_the_best_pages_are_selected_in_the_order_of_the_text() -> None:
    scores = torch.tensor([[[5.0, 1.0, 7.0, 5.0, -9.0]]])  # pages of 4 tokens, the last one has 2
    seq_lens, slots, budgets = torch.tensor([18]), torch.tensor([0]), torch.arange(19)
    budgets[18] = 9
    positions, counts = select_pages(scores, seq_lens, slots, 4, 12, budgets=budgets, force_newest=True)
    assert positions[0, 0, : int(counts[0, 0])].tolist() == [1, 2, 3, 8, 9, 10, 11, 16, 17]
    positions, counts = select_pages(scores, seq_lens, slots, 4, 12, num_excluded=torch.tensor([8]))
    assert positions[0, 0, : int(counts[0, 0])].tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 14, 15]


@pytest.mark.parametrize("similarity", [-1.0, 0.05, 1.0])
def test_queries_are_chosen_by_their_change(similarity, device, gpu_dtype, agree) -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(3, 8, 1, 24, generator=generator).to(device, gpu_dtype)[:, :6]  # strided
    last = torch.randn(4, 6, 24, generator=generator).to(device, gpu_dtype)
    agree(choose_queries, q, last, torch.tensor([2, 1, 3], device=device), 2, similarity)


@pytest.mark.parametrize("pages", [1, 300])
def test_shares_of_pages(pages, device, agree, monkeypatch) -> None:
    monkeypatch.setattr("sparsecache.kernels.page_shares._MAX_BLOCK_P", 128)
    generator = torch.Generator().manual_seed(3)
    past = torch.tensor([0, 4 * pages, 2 * pages, 1], device=device)
    sinks, recent = (torch.arange(4 * pages + 1, device=device) // part for part in (40, 60))

    def share(bounds):
        shares = page_shares(bounds, past, torch.tensor([3, 1, 2], device=device), sinks, recent, 4)
        is_held = torch.arange(pages, device=device) < torch.tensor([1, pages, -(-pages // 2)], device=device)[:, None]
        shares = shares.masked_fill(~is_held[:, None], 0)
        return shares.isinf(), shares.masked_fill(shares.isinf(), 0)

    agree(share, 5 * torch.randn(3, 2, 3, pages, generator=generator).to(device))


@pytest.mark.parametrize(("pages", "scored"), [(1, 16), (300, 304), (300, 300), (4096, 4096)])
def test_highest_shares_of_pages_that_are_not_exact(pages, scored, device, agree, monkeypatch) -> None:
    if pages < 1000:
        monkeypatch.setattr("sparsecache.kernels.page_shares._MAX_BLOCK_P", 128)
    generator = torch.Generator().manual_seed(3)
    scores = 5 * torch.randn(3, 2, 3, scored, generator=generator).to(device)
    is_exact = (torch.rand(4, 2, pages, generator=generator) < 0.3).to(device)
    is_exact[:, :, 200:], is_exact[3, 1] = True, True
    slots = torch.tensor([3, 1, 2], device=device)
    scores[..., 200:] = torch.nan  # undefined where no page is scored

    def share(is_exact):
        return highest_page_shares(scores, is_exact, slots)

    agree(share, is_exact)
    kept = ~is_exact[slots[1], 0]
    expected = scores[1, 0, :, :pages][:, kept].double().softmax(1).amax(0).log().float()
    torch.testing.assert_close(share(is_exact)[1, 0, kept], expected, rtol=1e-5, atol=1e-5)
