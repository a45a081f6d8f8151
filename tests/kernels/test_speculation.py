"""Speculated scores and the selection by threshold against sorting: odd lengths, ties at the threshold, all options."""

import itertools
import math

import pytest
import torch

from sparsecache.kernels import speculation
from sparsecache.kernels._triton import force_backend
from sparsecache.kernels.append_speculated import append_speculated
from sparsecache.kernels.speculation import speculated_scores
from sparsecache.kernels.threshold import Scores, SelectionParams, threshold_select

CASES = {  # slots, KV heads, group, head size, partial channels, capacity, tokens in the slots of the batch
    "empty": (2, 1, 2, 16, 8, 70, [0, 0]),
    "full": (1, 2, 2, 16, 16, 130, [130]),
    "around a block": (5, 1, 3, 40, 20, 300, [129, 299, 64, 127, 128]),
    "very unequal": (4, 3, 1, 32, 16, 1300, [1, 1200]),
    "wide group": (2, 1, 8, 64, 32, 700, [690, 257]),
}
if torch.cuda.is_available():  # the interpreter would take minutes for each
    CASES |= {
        "longest": (1, 8, 4, 128, 32, 131_073, [131_072]),
        "long, no groups": (3, 32, 1, 64, 16, 33_000, [32_769, 1, 32_999]),
        "a full batch": (16, 4, 2, 128, 32, 5000, [*range(1, 4900, 333), 4999]),
        "long, wide group": (2, 2, 8, 64, 32, 70_001, [70_000, 65_537]),
    }
OPTIONS = {  # alpha, budget, mean, sinks, recent
    "plain": (2.0, 0.2, True, 0, 0),
    "nothing is near": (0.0, 5, False, 0, 0),
    "everything": (math.inf, 1.0, True, 0, 0),
    "per KV head": (1.0, 0.5, False, 2, 3),
    "a count": (5.0, 30, True, 1, 0),
    "a count beyond int32": (math.inf, 2**32 + 5, True, 0, 0),
}
JOINED = {  # group, top_p: of the options above
    "softmax": ("softmax", 1.0),
    "half of the mass": ("max", 0.5),
    "most of the softmax": ("softmax", 0.9),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
Tokens = list[list[list[int]]]  # by row and KV head


def _inputs(case, device, dtype, ties: bool):
    slots, kv_heads, group, head_dim, channels, capacity, lengths = case
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        if ties:  # products that every dtype holds exactly
            return torch.randint(-1, 2, shape, generator=generator).to(device, kind)
        return torch.randn(*shape, generator=generator).to(device, kind)

    q = draw(len(lengths), group * kv_heads, 1, head_dim)
    projection = draw(slots, kv_heads, head_dim, channels, kind=torch.float32)
    keys = draw(slots, kv_heads, capacity, channels)
    order = torch.randperm(slots, generator=generator)[: len(lengths)].to(device)
    seq_lens = torch.zeros(slots, dtype=torch.int64, device=device)
    seq_lens[order] = torch.tensor(lengths, device=device)
    return q, projection, keys, seq_lens, order


def _params(options, capacity: int, device: torch.device) -> tuple[SelectionParams, int]:
    alpha, budget, mean, sinks, recent = options
    budgets = [max(1, math.floor(budget * n + 1e-6)) if budget <= 1 else budget for n in range(capacity + 1)]
    params = SelectionParams(alpha, torch.tensor(budgets, device=device), mean, sinks, recent)
    return params, min(capacity, max(budgets))


def _selected(scores, seq_lens, slots, params, width: int) -> Tokens:
    """Select by kernels if the scores have extremes, else by the reference."""
    positions, counts = threshold_select(scores, seq_lens, slots, params, width)
    assert positions.shape[2] <= width and positions.dtype == counts.dtype == torch.int64
    rows = zip(positions.tolist(), counts.tolist(), strict=True)
    return [[_sorted(head[:n]) for head, n in zip(*row, strict=True)] for row in rows]


def _sorted(positions: list[int]) -> list[int]:
    """Check that the positions are at most two ascending runs."""
    assert sum(a >= b for a, b in itertools.pairwise(positions)) <= 1
    return sorted(positions)


def _same_scores(inputs, **options) -> tuple[Scores, Scores]:
    """Return the scores that the kernel makes, for the selection by kernels and for that by the reference."""
    with force_backend("kernels"):
        scores = speculated_scores(*inputs, **options)
    return scores, scores._replace(extremes=None)


def _own_scores(inputs) -> tuple[Scores, Scores]:
    """Return the scores that the kernel makes, and those that the reference makes."""
    found = []
    for backend in ("kernels", "reference"):
        with force_backend(backend):
            found.append(speculated_scores(*inputs))
    return tuple(found)


def _both_selected(scores, inputs, params, width: int) -> tuple[Tokens, Tokens]:
    """Return what the kernels, and the reference, select by two results of `_same_scores` or `_own_scores`."""
    return tuple(_selected(each, *inputs[3:], params, width) for each in scores)


@cases
def test_ties_at_the_threshold_go_to_the_lowest_positions(case, device, gpu_dtype) -> None:
    inputs = _inputs(case, device, gpu_dtype, ties=True)
    scores = _same_scores(inputs)
    for name, options in OPTIONS.items():
        kernel, reference = _both_selected(scores, inputs, *_params(options, case[5], device))
        assert kernel == reference, name


@cases
def test_scores(case, device, dtype) -> None:
    """Scores of half-precision keys are rounded once, to float16. The extremes are those of each head's scores."""
    inputs = _inputs(case, device, dtype, ties=False)
    seq_lens, slots = inputs[3:]
    with force_backend("kernels"):
        scores, extremes, _ = speculated_scores(*inputs)
    with force_backend("reference"):
        exact = speculated_scores(*inputs).values
    assert scores.dtype == (torch.float32 if dtype == torch.float32 else torch.float16)
    assert exact.shape[3] == max(case[6])
    exact = exact.float()
    for row, length in enumerate(seq_lens[slots].tolist()):
        ours, theirs = scores[row, :, :, :length].float(), exact[row, :, :, :length]
        size = theirs.abs().amax() if length else 0.0
        torch.testing.assert_close(ours, theirs, rtol=2**-11 if scores.dtype == torch.float16 else 0, atol=1e-5 * size)
        if length:
            assert torch.equal(extremes[0, row].amax(-1), ours.flatten(0, 1).amax(-1))
            assert torch.equal(extremes[1, row].amin(-1), ours.flatten(0, 1).amin(-1))


def test_scores_beyond_half_precision_stay_finite(device) -> None:
    q, projection, keys, seq_lens, slots = _inputs(CASES["around a block"], device, torch.float16, ties=True)
    inputs = (q * 3e3, projection, keys * 8, seq_lens, slots)
    with force_backend("kernels"):
        scores = speculated_scores(*inputs).values
    assert scores[0, ..., : seq_lens[slots[0]]].abs().max() == torch.finfo(torch.float16).max
    kernel, reference = _both_selected(_same_scores(inputs), inputs, *_params(OPTIONS["plain"], 300, device))
    assert kernel == reference
    assert all(head for row in kernel for head in row)


def test_negative_zero_ties_with_zero(device) -> None:
    """Scores that are too small for float16 are rounded to either."""
    zeros = torch.zeros(1, 1, 1, 512, dtype=torch.float16, device=device)
    signed = torch.where(torch.arange(512, device=device) % 3 == 0, zeros, -zeros)
    seq_lens, slots = torch.tensor([500], device=device), torch.tensor([0], device=device)
    params, width = _params(OPTIONS["a count"], 512, device)
    found = _selected(Scores(signed, torch.zeros(2, 1, 1, 1, device=device)), seq_lens, slots, params, width)
    assert found == _selected(Scores(signed, None), seq_lens, slots, params, width) == [[list(range(width))]]


def test_uninitialized_memory_is_not_read(device, monkeypatch) -> None:
    """Scores beyond the last token are filled with values that would be selected."""
    empty = torch.empty

    def poisoned(*size, **options):
        made = empty(*size, **options)
        return made.fill_(torch.inf if made.is_floating_point() else 1_000_000)

    monkeypatch.setattr(torch, "empty", poisoned)
    for case in (CASES["around a block"], CASES["very unequal"]):
        inputs = _inputs(case, device, torch.float32, ties=True)
        kernel, reference = _both_selected(_same_scores(inputs), inputs, *_params(OPTIONS["plain"], case[5], device))
        assert kernel == reference


@cases
def test_random_scores(case, device) -> None:
    inputs = _inputs(case, device, torch.float32, ties=False)
    scores = _own_scores(inputs)
    for name in ("plain", "per KV head", "a count"):  # the others select all tokens, or none but the best
        kernel, reference = _both_selected(scores, inputs, *_params(OPTIONS[name], case[5], device))
        assert kernel == reference, name


@pytest.mark.parametrize(
    ("case", "joined"),
    [*((CASES["around a block"], joined) for joined in JOINED.values()), (CASES["empty"], ("softmax", 0.9))],
    ids=[*JOINED, "empty"],
)
def test_other_ways_to_join_query_heads(case, joined, device) -> None:
    """Where rounding decides whether a token is the last one, the kernels may select another token."""
    inputs = _inputs(case, device, torch.float32, ties=False)
    params, width = _params((math.inf, 0.3, False, 2, 3), case[5], device)
    params = params._replace(group=joined[0], top_p=joined[1])
    scores = _same_scores(inputs, with_sums=joined[0] == "softmax")
    kernel, reference = _both_selected(scores, inputs, params, width)
    pairs = [(set(a), set(b)) for row in zip(kernel, reference, strict=True) for a, b in zip(*row, strict=True)]
    assert sum(len(a ^ b) for a, b in pairs) <= 0.02 * sum(len(b) for _, b in pairs)
    assert bool(max(case[6])) == all(b for _, b in pairs)


@cases
@all_options
def test_the_reference_equals_a_loop(case, options) -> None:
    """Against a sort in plain Python, per KV head, of exact products."""
    device = torch.device("cpu")  # a GPU rounds the division otherwise than the loop
    inputs = _inputs(case, device, torch.float32, ties=True)
    params, width = _params(options, case[5], device)
    with force_backend("reference"):
        scores = speculated_scores(*inputs)
    found = _selected(scores, *inputs[3:], params, width)
    q, projection, keys, seq_lens, slots = (x.double().cpu() if x.is_floating_point() else x.cpu() for x in inputs)
    for row, slot in enumerate(slots.tolist()):
        past, margins = int(seq_lens[slot]), []
        for kv in range(keys.shape[1]):
            group = q[row].view(keys.shape[1], -1, q.shape[3])[kv] @ projection[slot, kv]  # [H / G, I]
            head_scores = (group @ keys[slot, kv, :past].T).float() / math.sqrt(q.shape[3])
            margin = (head_scores - head_scores.amax(1, keepdim=True)).amax(0).tolist() if past else []
            forced = [t < params.sinks or t >= past - params.recent for t in range(past)]
            margins.append([math.inf if f else m for f, m in zip(forced, margin, strict=True)])
        near = [sum(m > -params.alpha for m in margin) for margin in margins]
        if params.mean:
            near = [math.ceil(sum(near) / len(near))] * len(near)
        for kv, margin in enumerate(margins):
            count = min(near[kv], int(params.budgets[past]))
            expected = sorted(range(past), key=lambda t: (-margin[t], t))[:count]
            assert found[row][kv] == sorted(expected)


def test_the_number_of_recent_tokens_may_depend_on_the_past(device) -> None:
    """Each row is selected as with the table's number for all rows."""
    inputs = _inputs(CASES["around a block"], device, torch.float32, ties=False)
    params, width = _params((math.inf, 0.2, False, 1, 0), 300, device)
    table = torch.arange(301, device=device) // 7
    scores = _same_scores(inputs)
    both = _both_selected(scores, inputs, params._replace(recent=table), width)
    for row, past in enumerate(inputs[3][inputs[4]].tolist()):
        expected = _selected(scores[1], *inputs[3:], params._replace(recent=past // 7), width)
        assert all(found[row] == expected[row] for found in both)
        assert set(range(past - past // 7, past)) <= set(expected[row][0])


def test_half_precision_keys_do_not_round_the_query(device) -> None:
    """Nearly all tokens are those that float32 products select."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    inputs = _inputs(CASES["very unequal"], device, dtype, ties=False)
    kernel, reference = _both_selected(_own_scores(inputs), inputs, *_params(OPTIONS["plain"], 1300, device))
    pairs = [(set(a), set(b)) for row in zip(kernel, reference, strict=True) for a, b in zip(*row, strict=True)]
    assert sum(len(a ^ b) for a, b in pairs) <= 0.01 * sum(len(b) for _, b in pairs)


@pytest.mark.parametrize("splits", [1, 2, 9])
def test_any_number_of_splits(splits, device, monkeypatch) -> None:
    monkeypatch.setattr(speculation, "_split_count", lambda *_: splits)
    inputs = _inputs(CASES["very unequal"], device, torch.float32, ties=True)
    kernel, reference = _both_selected(_same_scores(inputs), inputs, *_params(OPTIONS["a count"], 1300, device))
    assert kernel == reference


@cases
def test_append_speculated(case, device, dtype, agree) -> None:
    _, projection, keys, seq_lens, order = _inputs(case, device, dtype, ties=False)
    slots, kv_heads, _, head_dim, _, capacity, _ = case
    store = torch.randn(slots, kv_heads, capacity, 2, head_dim).to(device, dtype)
    k, v = torch.randn(2, len(order), kv_heads, 1, head_dim).to(device, dtype)
    agree(append_speculated, k, v, projection, keys, store, seq_lens, order)


def test_keys_without_a_projection_score_as_with_the_identity(device, dtype) -> None:
    q, _, _, seq_lens, slots = _inputs(CASES["around a block"], device, dtype, ties=False)
    keys = torch.randn(5, 1, 300, 40, generator=torch.Generator().manual_seed(6)).to(device, dtype)
    identity = torch.eye(40, device=device).expand(5, 1, 40, 40).contiguous()
    for backend in ("kernels", "reference"):
        with force_backend(backend):
            plain, projected = (speculated_scores(q, each, keys, seq_lens, slots).values for each in (None, identity))
        for row, length in enumerate(seq_lens[slots].tolist()):
            torch.testing.assert_close(plain[row, ..., :length], projected[row, ..., :length], rtol=1e-3, atol=1e-4)
