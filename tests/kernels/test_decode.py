"""Attention over slots: kernels against references, references against a loop, over lengths, splits and groups."""

import pytest
import torch

from sparsecache.kernels import decode
from sparsecache.kernels._triton import force_backend, tl, triton
from sparsecache.kernels.attention import attention
from sparsecache.kernels.decode import _split_length, append_kv, attend_and_append, attend_gathered, attend_selected

CASES = {  # slots, KV heads, group, head size, capacity, lengths of the slots in the batch
    "empty": (2, 1, 2, 16, 70, [0, 0]),
    "one token": (1, 2, 1, 32, 70, [1]),
    "nearly full": (3, 1, 3, 40, 200, [199, 198]),
    "full": (2, 2, 4, 32, 130, [130, 129]),
    "around a block": (5, 2, 2, 64, 140, [63, 64, 65, 127, 128]),
    "very unequal": (4, 1, 8, 64, 1000, [999, 3, 640]),
    "wide group": (1, 1, 20, 16, 150, [149]),
    "more rows than splits": (15, 2, 1, 16, 70, [*range(14)]),
}
if torch.cuda.is_available():  # the interpreter would take minutes for each
    CASES |= {
        "longest": (1, 8, 4, 128, 131_073, [131_072]),
        "long, no groups": (3, 32, 1, 64, 33_000, [32_769, 1, 32_999]),
        "a full batch": (16, 4, 2, 128, 5000, [*range(1, 4900, 333), 4999]),
        "long, wide group": (2, 2, 8, 64, 70_001, [70_000, 65_537]),
    }
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
per_head = pytest.mark.parametrize("per_head", [False, True], ids=["all heads alike", "per KV head"])


def _cache(case, device, dtype, per_head: bool = False):
    slots, kv_heads, group, head_dim, capacity, lengths = case
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    heads = draw(len(lengths), (group + 2) * kv_heads, head_dim)[:, :, None]  # q, k and v share their rows' memory
    q, k, v = heads.tensor_split((group * kv_heads, (group + 1) * kv_heads), dim=1)
    keys, values = draw(slots, kv_heads, capacity, head_dim), draw(slots, kv_heads, capacity, head_dim)
    held = torch.zeros(slots, dtype=torch.int64, device=device)
    order = torch.randperm(slots, generator=generator)[: len(lengths)].to(device)
    held[order] = torch.tensor(lengths, device=device)
    if per_head:  # the first KV head keeps the length, the others are shorter
        share = torch.rand(slots, kv_heads, generator=generator).to(device)
        share[:, 0] = 1
        held = (held[:, None] * share).long()
    return q, k, v, keys, values, held, order, generator


@cases
def test_attend_and_append(case, device, dtype, agree) -> None:
    q, k, v, keys, values, held, order, _ = _cache(case, device, dtype)
    agree(attend_and_append, q, k, v, keys, values, held, order)


@cases
@per_head
@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_each_kv_head_attends_to_its_rows_and_the_new_token(case, per_head, backend, device) -> None:
    """Against one attention per sequence and KV head. Lengths and all other rows of the cache do not change."""
    q, k, v, keys, values, held, order, _ = _cache(case, device, torch.float32, per_head)
    group, capacity = q.shape[1] // k.shape[1], keys.shape[2]
    lengths, old_keys, old_values = held.clone(), keys.clone(), values.clone()
    appended_keys, appended_values = keys.clone(), values.clone()
    append_kv(k, v, appended_keys, appended_values, held, order)
    with force_backend(backend):
        out = attend_and_append(q, k, v, keys, values, held, order)
    assert torch.equal(held, lengths)
    assert torch.equal(keys, appended_keys) and torch.equal(values, appended_values)
    rows = lengths.expand(k.shape[1], -1).T if lengths.dim() == 1 else lengths
    for b, slot in enumerate(order.tolist()):
        for kv, length in enumerate(rows[slot].tolist()):
            row, heads = min(length, capacity - 1), slice(kv * group, (kv + 1) * group)
            old_keys[slot, kv, row], old_values[slot, kv, row] = k[b, kv, 0], v[b, kv, 0]
            seen = [x[slot, kv, : row + 1][None, None] for x in (old_keys, old_values)]
            torch.testing.assert_close(out[b : b + 1, heads], attention(q[b : b + 1, heads], *seen))
    assert torch.equal(keys, old_keys) and torch.equal(values, old_values)


@cases
@pytest.mark.parametrize("width", [1, 100])
def test_attend_selected(case, width, device, dtype, agree) -> None:
    q, k, v, keys, values, held, order, generator = _cache(case, device, dtype)
    batch, kv_heads, capacity = len(order), k.shape[1], keys.shape[2]
    selected = torch.rand(batch, kv_heads, capacity, generator=generator).argsort(-1)[..., :width].to(device)
    counts = torch.randint(0, selected.shape[2] + 1, (batch, kv_heads), generator=generator).to(device)
    counts[0, 0] = selected.shape[2]
    if width == 1:  # also appends, to a row that is not selected
        selected = selected.minimum(held[order].clamp(max=capacity - 1)[:, None, None] - 1).clamp(min=0)
        counts = counts.clamp(max=held[order][:, None])
    agree(attend_selected, q, k, v, keys, values, order, selected, counts, held if width == 1 else None)


def test_a_selection_appends_at_a_row_per_kv_head(device, dtype, agree) -> None:
    q, k, v, keys, values, held, order, _ = _cache(CASES["around a block"], device, dtype, per_head=True)
    selected, counts = (make(5, 2, dtype=torch.int64, device=device) for make in (torch.zeros, torch.ones))
    agree(attend_selected, q, k, v, keys, values, order, selected[..., None], counts, held)


def test_all_entries_of_a_selection_are_valid(device, dtype, agree) -> None:
    q, k, v, keys, values, _, order, generator = _cache(CASES["around a block"], device, dtype)
    selected = torch.rand(5, 2, 140, generator=generator).argsort(-1)[..., :40].to(device)
    agree(attend_selected, q, k, v, keys, values, order, selected, torch.full((5, 2), 40, device=device))


def test_a_slice_of_a_wider_selection(device, dtype) -> None:
    q, k, v, keys, values, _, order, generator = _cache(CASES["around a block"], device, dtype)
    wider = torch.rand(5, 2, 140, generator=generator).argsort(-1).to(device)
    counts = torch.full((5, 4), 30, device=device)[:, ::2]
    with force_backend("kernels"):
        part, whole = (
            attend_selected(q, k, v, keys, values, order, selected, number)
            for selected, number in ((wider[..., :30], counts), (wider[..., :30].clone(), counts.clone()))
        )
    assert torch.equal(part, whole)


@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_rows_beyond_the_count_may_hold_nan(backend, device) -> None:
    q, k, v, keys, values, *_ = _cache(CASES["around a block"], device, torch.float32)
    rows = torch.stack((keys, values), 3)[:, :, :40].contiguous()
    counts = torch.tensor([[0, 40], [7, 7], [39, 1], [40, 40], [0, 0]], device=device)
    invalid = torch.arange(40, device=device) >= counts[..., None]
    with force_backend(backend):
        expected = attend_gathered(q, k, v, rows, counts)
        found = attend_gathered(q, k, v, rows.masked_fill(invalid[..., None, None], torch.nan), counts)
    assert expected.isfinite().all() and torch.equal(found, expected)


@pytest.mark.parametrize("splits", [3, 33, 110])
def test_any_number_of_splits(splits, device, dtype, agree, monkeypatch) -> None:
    monkeypatch.setattr(decode, "split_count", lambda *_: splits)
    q, k, v, keys, values, held, order, _ = _cache(CASES["very unequal"], device, dtype)
    agree(attend_and_append, q, k, v, keys, values, held, order)


@pytest.mark.parametrize("splits", [5, 33])
def test_lengths_per_kv_head_in_any_number_of_splits(splits, device, agree, monkeypatch) -> None:
    monkeypatch.setattr(decode, "split_count", lambda *_: splits)
    q, k, v, keys, values, held, order, _ = _cache(CASES["around a block"], device, torch.float32, per_head=True)
    agree(attend_and_append, q, k, v, keys, values, held, order)


@triton.jit
def _store_split_length(counts, splits, out, rows: tl.constexpr):
    tl.store(out, _split_length(tl.load(counts + tl.arange(0, rows)), splits))


UNEQUAL = {  # tokens of rows, splits
    "equal": ([32_768] * 8, 33),
    "as many splits as rows": ([5, 131_072, 77, 1], 4),
    "one long": ([100_000, *[2000] * 23, *[0] * 8], 33),  # rows without tokens are no rows
    "one less long": ([10_000, *[1000] * 29, 0, 0], 33),
    "few splits": ([30_000, *[1000] * 6, 0], 8),
    "all lengths": ([2**n for n in range(1, 17)], 33),
    "single tokens": ([1] * 16, 24),
    "many splits": ([131_072, 40, 3000, 1], 500),
}


@pytest.mark.parametrize(("counts", "splits"), UNEQUAL.values(), ids=UNEQUAL)
def test_splits_are_at_most_an_eighth_longer_than_necessary(counts, splits, device) -> None:
    out = torch.zeros(1, dtype=torch.int32, device=device)
    _store_split_length[(1,)](torch.tensor(counts, dtype=torch.int32, device=device), splits, out, len(counts))
    length = int(out)
    shortest = next(n for n in range(1, max(counts) + 1) if sum(-(-count // n) for count in counts) <= splits)
    assert length % 16 == 0 and sum(-(-count // length) for count in counts) <= splits
    assert length <= 1.12 * shortest + 16


def test_large_scores_do_not_overflow(device, dtype, agree) -> None:
    q, k, v, keys, values, held, order, _ = _cache(CASES["around a block"], device, dtype)
    agree(attend_and_append, 60 * q, 60 * k, v, keys, values, held, order)
