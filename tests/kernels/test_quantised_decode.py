"""Attention over quantised tokens: kernels against references, references against attention over dequantised tokens."""

from dataclasses import replace

import pytest
import torch

from sparsecache.kernels import quantised_decode
from sparsecache.kernels._triton import force_backend
from sparsecache.kernels.attention import attention
from sparsecache.kernels.page_selection import PageSelection, positions_of_pages
from sparsecache.kernels.quantisation import QuantisedStore
from sparsecache.kernels.quantised_decode import (
    attend_pages_quantised,
    attend_quantised,
    attend_selected_quantised,
    attends_to_pages,
)

DTYPES = [torch.float16, torch.float32, torch.bfloat16][: 3 if torch.cuda.is_available() else 1]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CASES = {  # bits, group, residual, slots, KV heads, query heads per KV head, channels, capacity, lengths in the batch
    "one token": (4, 16, 16, 1, 1, 2, 16, 70, [1]),
    "few channels": (2, 16, 0, 1, 1, 4, 16, 70, [35]),
    "no tail, one empty": (2, 16, 0, 2, 2, 1, 32, 70, [47, 0]),
    "around a group": (4, 32, 32, 5, 1, 3, 40, 140, [63, 64, 65, 127, 96]),
    "full": (8, 16, 32, 2, 2, 4, 32, 130, [130, 129]),
    "very unequal": (2, 32, 64, 4, 1, 8, 64, 400, [399, 3, 170]),
    "wide groups": (4, 64, 0, 1, 1, 1, 80, 200, [127]),
    "odd number of groups": (2, 32, 32, 1, 1, 4, 128, 240, [230]),
    "eight heads per KV head": (4, 32, 0, 1, 1, 8, 128, 110, [100]),
}
if torch.cuda.is_available():  # the interpreter would take minutes for each
    CASES |= {
        f"long, {bits} bits": (bits, 32, 128, 3, 8, 4, 128, 33_000, [32_769, 1, 32_999]) for bits in (2, 4, 8)
    } | {
        "one long": (4, 128, 128, 1, 8, 4, 128, 131_073, [131_072]),
        "two warps": (4, 32, 128, 2, 2, 8, 128, 5000, [4900, 77]),
        "many channels": (2, 32, 0, 1, 1, 4, 256, 3000, [2900]),
        "many value groups": (8, 16, 16, 1, 1, 16, 128, 2000, [1999]),
    }
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
PARTS = ("key_codes", "key_ranges", "value_codes", "value_ranges", "key_tail", "value_tail")


def _draw(case, device, dtype, per_head: bool = False):
    """Return q, k, v, a store that holds random tokens, its lengths and the slots of the batch."""
    bits, group, residual, slots, kv_heads, heads, head_dim, capacity, lengths = case
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    store = QuantisedStore.allocate(slots, kv_heads, capacity, head_dim, bits, group, residual, device, dtype)
    held = torch.zeros(slots, kv_heads, dtype=torch.int64)
    order = torch.randperm(slots, generator=generator)[: len(lengths)]
    held[order] = torch.tensor(lengths)[:, None]
    if per_head:
        held[:, 1:] = (held[:, 1:] * torch.rand(slots, kv_heads - 1, generator=generator)).long()
    for slot, of_slot in enumerate(held.to(device)):
        prompt = draw(kv_heads, capacity, head_dim), draw(kv_heads, capacity, head_dim)
        store.store_prompt(slot, *prompt, of_slot.clamp(max=capacity))
    new = draw(len(lengths), (heads + 2) * kv_heads, head_dim)[:, :, None]
    q, k, v = new.tensor_split((heads * kv_heads, (heads + 1) * kv_heads), dim=1)
    held = held.to(device)
    return q, k, v, store, held if per_head else held[:, 0].contiguous(), order.to(device), generator


def _run(function, store: QuantisedStore, backend: str, *arguments):
    """Return what a function gives on a copy of the store, and the parts of that copy."""
    copies = {name: getattr(store, name).clone() for name in PARTS}
    copy = replace(store, **copies)
    with force_backend(backend):
        return function(copy, *arguments), copies


def _same(function, store: QuantisedStore, dtype, *arguments) -> None:
    kernel, reference = (_run(function, store, backend, *arguments) for backend in ("kernels", "reference"))
    for name in PARTS:
        assert torch.equal(kernel[1][name], reference[1][name]), name
    if kernel[0] is not None:
        out, expected = kernel[0].double(), reference[0].double()
        error = (out - expected).norm() / expected.norm()
        assert out.isfinite().all() and error < TOLERANCE[dtype]


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_equal_the_references(case, device, dtype) -> None:
    q, k, v, store, held, order, generator = _draw(case, device, dtype, per_head=case[4] > 1)
    _same(lambda store: attend_quantised(q, k, v, store, held, order), store, dtype)
    past = store.past(held, order)
    selected = torch.stack([torch.randperm(store.capacity, generator=generator) for _ in range(past.numel())])
    selected = selected.view(*past.shape, -1).to(device)
    counts = past - past // 3
    is_past = selected < past[..., None]
    for key in (selected.masked_fill(~is_past, store.capacity), ~is_past):  # ascending, and in any order
        chosen = selected.gather(2, key.long().argsort(dim=2, stable=True))[..., : max(1, int(counts.max()))]
        _same(lambda store: attend_selected_quantised(q, k, v, store, held, order, chosen, counts), store, dtype)  # noqa: B023


@cases
@pytest.mark.parametrize("page", [16, 32, 48])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32], ids=str)
def test_pages_are_attended_to_as_their_tokens(case, page, dtype, device) -> None:
    """Also if no page is selected, or only one whose first tokens are not, and if the newest page is or is not."""
    q, k, v, store, held, order, generator = _draw(case, device, dtype)
    past = store.past(held, order)
    num_pages = -(-past // page)
    width = -(-store.capacity // page)
    for share in (0.0, 0.4, 1.0):
        drawn = torch.rand(*past.shape, width, generator=generator).to(device) < share
        drawn &= torch.arange(width, device=device) < num_pages[..., None]
        listed = drawn.sum(2)
        pages = (~drawn).sort(dim=2, stable=True).indices
        place = (torch.rand(*past.shape, generator=generator).to(device) * listed).long()
        cut_page = pages.gather(2, place[..., None])[..., 0]
        tokens = (past - page * cut_page).clamp(0, page)  # in the page that is cut
        num_cut = (torch.rand(*past.shape, generator=generator).to(device) * tokens).long() * (listed > 0)
        counts = (
            (past[..., None] - page * pages).clamp(0, page) * (torch.arange(width, device=device) < listed[..., None])
        ).sum(2)
        selection = PageSelection(
            pages.int(), torch.stack((listed, cut_page, num_cut), 2).int(), counts - num_cut, page
        )
        assert torch.equal(positions_of_pages(selection, past[:, 0]).counts, selection.counts)
        _same(lambda store: attend_pages_quantised(q, k, v, store, held, order, selection), store, dtype)  # noqa: B023


@pytest.mark.parametrize("length", [50, 190])
def test_a_sequence_does_not_get_what_an_earlier_one_left_in_its_slot(length, device, dtype) -> None:
    """NaN and infinity that were not overwritten. The shorter sequence has no quantised token."""
    q, k, v, store, _, order, generator = _draw((4, 32, 32, 1, 1, 4, 64, 400, [390]), device, dtype)
    bad = torch.randn(2, 1, 390, 64, generator=generator).to(device, dtype)
    bad[0, :, ::5], bad[1, :, ::7] = torch.nan, torch.inf
    store.store_prompt(0, *bad)
    store.store_prompt(0, *torch.randn(2, 1, length, 64, generator=generator).to(device, dtype))
    held, pages = torch.tensor([length], device=device), torch.arange(-(-length // 16), device=device)[None, None]
    cuts = torch.tensor([[[pages.numel(), 0, 3]]], device=device)
    selection = PageSelection(pages.int(), cuts.int(), torch.full((1, 1), length - 3, device=device), 16)
    attends = [
        lambda store: attend_quantised(q, k, v, store, held, order),
        lambda store: attend_selected_quantised(q, k, v, store, held, order, *positions_of_pages(selection, held)),
        lambda store: attend_pages_quantised(q, k, v, store, held, order, selection),
    ]
    for attend in attends if dtype != torch.float32 else attends[:2]:
        found, expected = (_run(attend, store, backend)[0].double() for backend in ("kernels", "reference"))
        assert found.isfinite().all() and (found - expected).norm() < TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize(("dtype", "page"), [(torch.float32, 16), (torch.float16, 24)], ids=str)
def test_pages_that_the_kernel_does_not_take_are_refused(dtype, page, device) -> None:
    q, k, v, store, held, order, _ = _draw(CASES["wide groups"], device, dtype)
    one = torch.ones(1, 1, 1, dtype=torch.int64, device=device)
    with force_backend("kernels"):
        assert not attends_to_pages(store, page) and attends_to_pages(store, 16) == (dtype == torch.float16)
        with pytest.raises(ValueError, match=f"pages of {page} tokens in {dtype}.* Select tokens instead"):
            attend_pages_quantised(q, k, v, store, held, order, PageSelection(one, one, one[0], page))


@pytest.mark.parametrize("num_multiprocessors", [6, 132])
def test_one_sequence_attends_only_to_its_new_token_if_nothing_is_selected(
    num_multiprocessors, device, dtype, monkeypatch
) -> None:
    """Then all splits but the last are empty, also all that are merged at a time."""
    monkeypatch.setattr(quantised_decode, "num_sms", lambda _: num_multiprocessors)
    q, k, v, store, held, order, _ = _draw(CASES["wide groups"], device, dtype)
    selected, counts = (torch.zeros(size, dtype=torch.int64, device=device) for size in ((1, 1, 5), (1, 1)))
    with force_backend("kernels"):
        out = attend_selected_quantised(q, k, v, store, held, order, selected, counts)
    torch.testing.assert_close(out, v.expand_as(out))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32], ids=str)
def test_the_kernel_rounds_as_little_as_attention_over_dequantised_tokens(bits, device, dtype) -> None:
    """The error against float64 is below the dtype's epsilon, with a large, a constant and a small channel."""
    q, k, v, store, held, order, generator = _draw((bits, 32, 32, 1, 1, 4, 64, 200, [190]), device, dtype)
    k, v = torch.randn(2, 1, 190, 64, generator=generator).to(device, dtype)
    k[..., 0], k[..., 1], v[..., 2] = 20 * k[..., 0], 7.0, v[..., 2] / 1000
    store.store_prompt(0, k, v)
    new = k[:, None, -1:], v[:, None, -1:]
    parts = {name: getattr(store, name).double() for name in PARTS if "codes" not in name}
    double = (x.double() for x in (q, *new))
    with force_backend("reference"):
        exact = attend_quantised(*double, replace(store, **parts), held, order)
    with force_backend("kernels"):
        out = attend_quantised(q, *new, store, held, order)
    assert (out.double() - exact).norm() / exact.norm() < torch.finfo(dtype).eps


@cases
def test_each_kv_head_attends_to_its_dequantised_past_and_the_new_token(case, device) -> None:
    q, k, v, store, held, order, _ = _draw(case, device, torch.float32, per_head=case[4] > 1)
    past, group = store.past(held, order), q.shape[1] // k.shape[1]
    keys, values = (read(held, order, int(past.max())) for read in (store.keys, store.values))
    with force_backend("reference"):
        out = attend_quantised(q, k, v, store, held, order)
    for b, of_row in enumerate(past.tolist()):
        for kv, length in enumerate(of_row):
            heads = slice(kv * group, (kv + 1) * group)
            seen = [torch.cat((x[b, kv, :length], new[b, kv]))[None, None] for x, new in ((keys, k), (values, v))]
            torch.testing.assert_close(out[b : b + 1, heads], attention(q[b : b + 1, heads], *seen))
