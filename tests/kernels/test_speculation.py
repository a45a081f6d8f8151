"""Speculation and selection by counting bits against sorting: odd lengths, ties at the cut, every rule."""

import itertools
import math

import pytest
import torch

from sparsecache.kernels import decode, speculation
from sparsecache.kernels._triton import running
from sparsecache.kernels.cut import Rule, Scores, take_nearest
from sparsecache.kernels.speculation import remember, speculate

CASES = {  # slots, KV heads, group, head size, columns, room, tokens in the slots of the batch
    "empty": (2, 1, 2, 16, 8, 70, [0, 0]),
    "full": (1, 2, 2, 16, 16, 130, [130]),
    "around a block": (5, 1, 3, 40, 20, 300, [129, 299, 64, 127, 128]),
    "very unlike": (4, 3, 1, 32, 16, 1300, [1, 1200]),
    "wide group": (2, 1, 8, 64, 32, 700, [690, 257]),
}
if torch.cuda.is_available():  # the interpreter would take minutes for each
    CASES |= {
        "longest": (1, 8, 4, 128, 32, 131_073, [131_072]),
        "long, no groups": (3, 32, 1, 64, 16, 33_000, [32_769, 1, 32_999]),
        "a full batch": (16, 4, 2, 128, 32, 5000, [*range(1, 4900, 333), 4999]),
        "long, wide group": (2, 2, 8, 64, 32, 70_001, [70_000, 65_537]),
    }
RULES = {  # alpha, budget, mean, sinks, recent
    "plain": (2.0, 0.2, True, 0, 0),
    "nothing is near": (0.0, 5, False, 0, 0),
    "everything": (math.inf, 1.0, True, 0, 0),
    "each its own": (1.0, 0.5, False, 2, 3),
    "a count": (5.0, 30, True, 1, 0),
    "a count beyond int32": (math.inf, 2**32 + 5, True, 0, 0),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def _inputs(case, device, dtype, ties: bool):
    slots, kv_heads, group, head_dim, columns, room, lengths = case
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        if ties:  # products that every dtype holds exactly
            return torch.randint(-1, 2, shape, generator=generator).to(device, kind)
        return torch.randn(*shape, generator=generator).to(device, kind)

    q = draw(len(lengths), group * kv_heads, 1, head_dim)
    mixing = draw(slots, kv_heads, head_dim, columns, kind=torch.float32)
    keys = draw(slots, kv_heads, room, columns)
    order = torch.randperm(slots, generator=generator)[: len(lengths)].to(device)
    past = torch.zeros(slots, dtype=torch.int64, device=device)
    past[order] = torch.tensor(lengths, device=device)
    return q, mixing, keys, past, order


def _rule(rule, room: int, device: torch.device) -> tuple[Rule, int]:
    alpha, budget, mean, sinks, recent = rule
    caps = [max(1, math.floor(budget * n + 1e-6)) if budget <= 1 else budget for n in range(room + 1)]
    return Rule(alpha, torch.tensor(caps, device=device), mean, sinks, recent), min(room, max(caps))


def _cut(scores, past, slots, rule, width: int) -> list[list[list[int]]]:
    """By kernels where the scores have extremes, else by the plain twin."""
    positions, counts = take_nearest(scores, past, slots, rule, width)
    rows = zip(positions.tolist(), counts.tolist(), strict=True)
    return [[_in_order(head[:n]) for head, n in zip(*row, strict=True)] for row in rows]


def _in_order(positions: list[int]) -> list[int]:
    """Checks that they ascend but once, where those nearest to the cut begin."""
    assert sum(a >= b for a, b in itertools.pairwise(positions)) <= 1
    return sorted(positions)


def _of_same_scores(inputs, rule, width: int) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
    """What the kernels, and the plain twin, take by the scores that the kernel makes."""
    q, columns, keys, past, slots = inputs
    with running("kernels"):
        scores = speculate(q, columns, keys, past, slots)
    return tuple(_cut(each, past, slots, rule, width) for each in (scores, scores._replace(extremes=None)))


def _of_own_scores(inputs, rule, width: int) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
    found = []
    for which in ("kernels", "twins"):
        with running(which):
            scores = speculate(*inputs)
        found.append(_cut(scores, *inputs[3:], rule, width))
    return tuple(found)


@cases
@rules
def test_ties_at_the_cut_go_to_the_lowest_positions(case, rule, device, dtype) -> None:
    inputs = _inputs(case, device, dtype, ties=True)
    rule, width = _rule(rule, case[5], device)
    kernel, twin = _of_same_scores(inputs, rule, width)
    assert kernel == twin


@cases
def test_scores(case, device, dtype) -> None:
    """Of keys in half precision rounded once, to float16; each head's extremes are among them."""
    inputs = _inputs(case, device, dtype, ties=False)
    past, slots = inputs[3:]
    with running("kernels"):
        scores, extremes = speculate(*inputs)
    with running("twins"):
        exact, _ = speculate(*inputs)
    assert scores.dtype == (torch.float32 if dtype == torch.float32 else torch.float16)
    exact = exact.float()
    for row, held in enumerate(past[slots].tolist()):
        ours, theirs = scores[row, :, :, :held].float(), exact[row, :, :, :held]
        size = theirs.abs().amax() if held else 0.0
        torch.testing.assert_close(ours, theirs, rtol=2**-11 if scores.dtype == torch.float16 else 0, atol=1e-5 * size)
        if held:
            assert torch.equal(extremes[0, row].amax(-1), ours.flatten(0, 1).amax(-1))
            assert torch.equal(extremes[1, row].amin(-1), ours.flatten(0, 1).amin(-1))


def test_scores_beyond_half_precision_stay_numbers(device) -> None:
    q, columns, keys, past, slots = _inputs(CASES["around a block"], device, torch.float16, ties=True)
    rule, width = _rule(RULES["plain"], 300, device)
    inputs = (q * 3e3, columns, keys * 8, past, slots)
    with running("kernels"):
        scores, _ = speculate(*inputs)
    assert scores[0, ..., : past[slots[0]]].abs().max() == torch.finfo(torch.float16).max
    kernel, twin = _of_same_scores(inputs, rule, width)
    assert kernel == twin
    assert all(head for row in kernel for head in row)


def test_a_zero_is_as_near_as_one_below_zero(device) -> None:
    """Scores that are too small for float16 are rounded to either."""
    zeros = torch.zeros(1, 1, 1, 512, dtype=torch.float16, device=device)
    signed = torch.where(torch.arange(512, device=device) % 3 == 0, zeros, -zeros)
    past, slots = torch.tensor([500], device=device), torch.tensor([0], device=device)
    rule, width = _rule(RULES["a count"], 512, device)
    found = _cut(Scores(signed, torch.zeros(2, 1, 1, 1, device=device)), past, slots, rule, width)
    assert found == _cut(Scores(signed, None), past, slots, rule, width) == [[list(range(width))]]


def test_memory_that_nothing_wrote_is_not_believed(device, monkeypatch) -> None:
    """Behind the last token, rows of scores are filled with what would win."""
    empty = torch.empty

    def poisoned(*size, **options):
        made = empty(*size, **options)
        return made.fill_(torch.inf if made.is_floating_point() else 1_000_000)

    monkeypatch.setattr(torch, "empty", poisoned)
    for case in (CASES["around a block"], CASES["very unlike"]):
        inputs = _inputs(case, device, torch.float32, ties=True)
        rule, width = _rule(RULES["plain"], case[5], device)
        kernel, twin = _of_same_scores(inputs, rule, width)
        assert kernel == twin


@cases
@rules
def test_random_scores(case, rule, device) -> None:
    inputs = _inputs(case, device, torch.float32, ties=False)
    rule, width = _rule(rule, case[5], device)
    kernel, twin = _of_own_scores(inputs, rule, width)
    assert kernel == twin


def test_half_precision_keys_cost_no_choice_of_the_query(device) -> None:
    """The query is not rounded to the keys' dtype: nearly all choices are those of float32 products."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    inputs = _inputs(CASES["very unlike"], device, dtype, ties=False)
    rule, width = _rule(RULES["plain"], 1300, device)
    kernel, twin = _of_own_scores(inputs, rule, width)
    pairs = [(set(a), set(b)) for row in zip(kernel, twin, strict=True) for a, b in zip(*row, strict=True)]
    assert sum(len(a ^ b) for a, b in pairs) <= 0.01 * sum(len(b) for _, b in pairs)


@pytest.mark.parametrize("splits", [1, 2, 9])
def test_any_number_of_splits(splits, device, monkeypatch) -> None:
    monkeypatch.setattr(speculation, "_split_count", lambda *_: splits)
    inputs = _inputs(CASES["very unlike"], device, torch.float32, ties=True)
    rule, width = _rule(RULES["a count"], 1300, device)
    kernel, twin = _of_same_scores(inputs, rule, width)
    assert kernel == twin


@cases
def test_remember(case, device, dtype, agree) -> None:
    _, mixing, partial, past, order = _inputs(case, device, dtype, ties=False)
    slots, kv_heads, _, head_dim, _, room, _ = case
    store = torch.randn(slots, kv_heads, room, 2, head_dim).to(device, dtype)
    k, v = torch.randn(2, len(order), kv_heads, 1, head_dim).to(device, dtype)
    agree(remember, k, v, mixing, partial, store, past, order)


def test_what_is_written_down_of_a_step(device) -> None:
    counts = torch.tensor([[3, 5], [0, 1]], device=device)
    slots, found = torch.tensor([2, 0], device=device), []
    for which in ("kernels", "twins"):
        zeros = torch.zeros(3, dtype=torch.int64, device=device)
        ledger = decode.Ledger(
            past=torch.tensor([0, 7, 10], device=device),
            kept=torch.zeros(3, 2, dtype=torch.float64, device=device),
            fetched=torch.zeros(3, 2, dtype=torch.int64, device=device),
            steps=zeros.clone(),
            capped=zeros.clone(),
            caps=torch.tensor([max(1, n // 2) for n in range(13)], device=device),
        )
        with running(which):
            for _ in range(4):
                ledger.note(slots, counts)
        found.append(ledger)
    for kernel, twin in zip(*found, strict=True):
        torch.testing.assert_close(kernel, twin, rtol=1e-15, atol=0)
    assert found[1].past.tolist() == [4, 7, 12] and found[1].steps.tolist() == [4, 0, 4]
    assert found[1].capped.tolist() == [2, 0, 4] and found[1].fetched[2].tolist() == [12, 20]
