"""Attention over slots against its twin: every length, split and group, and what is written where."""

import pytest
import torch

from sparsecache.kernels import decode
from sparsecache.kernels._triton import running, tl, triton
from sparsecache.kernels.decode import _part_length as part_length
from sparsecache.kernels.decode import attend_and_append, attend_selected

CASES = {  # slots, KV heads, group, head size, room, lengths of the slots in the batch
    "empty": (2, 1, 2, 16, 70, [0, 0]),
    "one token": (1, 2, 1, 32, 70, [1]),
    "nearly full": (3, 1, 3, 40, 200, [199, 198]),
    "full": (2, 2, 4, 32, 130, [130, 129]),
    "around a block": (5, 2, 2, 64, 140, [63, 64, 65, 127, 128]),
    "very unlike": (4, 1, 8, 64, 1000, [999, 3, 640]),
    "wide group": (1, 1, 20, 16, 150, [149]),
    "more rows than parts": (21, 2, 1, 16, 70, [*range(20)]),
}
if torch.cuda.is_available():  # the interpreter would take minutes for each
    CASES |= {
        "longest": (1, 8, 4, 128, 131_073, [131_072]),
        "long, no groups": (3, 32, 1, 64, 33_000, [32_769, 1, 32_999]),
        "a full batch": (16, 4, 2, 128, 5000, [*range(1, 4900, 333), 4999]),
        "long, wide group": (2, 2, 8, 64, 70_001, [70_000, 65_537]),
    }
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def _cache(case, device, dtype):
    slots, kv_heads, group, head_dim, room, lengths = case
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    heads = draw(len(lengths), (group + 2) * kv_heads, head_dim)[:, :, None]  # q, k and v share their rows' memory
    q, k, v = heads.tensor_split((group * kv_heads, (group + 1) * kv_heads), dim=1)
    keys, values = draw(slots, kv_heads, room, head_dim), draw(slots, kv_heads, room, head_dim)
    held = torch.zeros(slots, dtype=torch.int64, device=device)
    order = torch.randperm(slots, generator=generator)[: len(lengths)].to(device)
    held[order] = torch.tensor(lengths, device=device)
    return q, k, v, keys, values, held, order, generator


@cases
def test_attend_and_append(case, device, dtype, agree) -> None:
    q, k, v, keys, values, held, order, _ = _cache(case, device, dtype)
    agree(attend_and_append, q, k, v, keys, values, held, order)


@cases
@pytest.mark.parametrize("most", [1, 40, 150])
def test_attend_selected(case, most, device, dtype, agree) -> None:
    q, k, v, keys, values, _, order, generator = _cache(case, device, dtype)
    batch, kv_heads, room = len(order), k.shape[1], keys.shape[2]
    selected = torch.rand(batch, kv_heads, room, generator=generator).argsort(-1)[..., :most].to(device)
    counts = torch.randint(0, selected.shape[2] + 1, (batch, kv_heads), generator=generator).to(device)
    counts[0, 0] = selected.shape[2]
    agree(attend_selected, q, k, v, keys, values, order, selected, counts)


def test_a_part_of_a_wider_list_is_read_as_what_it_is(device, dtype) -> None:
    q, k, v, keys, values, _, order, generator = _cache(CASES["around a block"], device, dtype)
    wider = torch.rand(5, 2, 140, generator=generator).argsort(-1).to(device)
    counts = torch.full((5, 4), 30, device=device)[:, ::2]
    with running("kernels"):
        part, whole = (
            attend_selected(q, k, v, keys, values, order, selected, number)
            for selected, number in ((wider[..., :30], counts), (wider[..., :30].clone(), counts.clone()))
        )
    assert torch.equal(part, whole)


@pytest.mark.parametrize("parts", [3, 4, 33, 200])
def test_any_number_of_parts(parts, device, dtype, agree, monkeypatch) -> None:
    monkeypatch.setattr(decode, "part_count", lambda *_: parts)
    q, k, v, keys, values, held, order, _ = _cache(CASES["very unlike"], device, dtype)
    agree(attend_and_append, q, k, v, keys, values, held, order)


@triton.jit
def _tell(counts, parts, out, rows: tl.constexpr):
    tl.store(out, part_length(tl.load(counts + tl.arange(0, rows)), parts))


UNLIKE = {  # tokens of rows, parts
    "equal": ([32_768] * 8, 33),
    "as many parts as rows": ([5, 131_072, 77, 1], 4),
    "one long": ([100_000, *[2000] * 23, *[0] * 8], 33),  # rows without tokens are no rows
    "one less long": ([10_000, *[1000] * 29, 0, 0], 33),
    "few parts": ([30_000, *[1000] * 6, 0], 8),
    "all lengths": ([2**n for n in range(1, 17)], 33),
    "single tokens": ([1] * 16, 24),
    "many parts": ([131_072, 40, 3000, 1], 500),
}


@pytest.mark.parametrize(("counts", "parts"), UNLIKE.values(), ids=UNLIKE)
def test_parts_of_unlike_rows_are_hardly_longer_than_they_must_be(counts, parts, device) -> None:
    told = torch.zeros(1, dtype=torch.int32, device=device)
    _tell[(1,)](torch.tensor(counts, dtype=torch.int32, device=device), parts, told, len(counts))
    length = int(told)
    least = next(n for n in range(1, max(counts) + 1) if sum(-(-count // n) for count in counts) <= parts)
    assert length % 16 == 0 and sum(-(-count // length) for count in counts) <= parts
    assert length <= 1.12 * least + 16


def test_large_scores_do_not_overflow(device, dtype, agree) -> None:
    q, k, v, keys, values, held, order, _ = _cache(CASES["around a block"], device, dtype)
    agree(attend_and_append, 60 * q, 60 * k, v, keys, values, held, order)
