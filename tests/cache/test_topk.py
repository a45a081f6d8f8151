"""The highest scores within a budget against torch.topk, one KV head at a time."""

import pytest
import torch
from torch import Tensor

from sparsecache.cache.budget import Budget
from sparsecache.cache.topk import select_topk
from sparsecache.kernels._triton import AVAILABLE, force_backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ["reference", *(["kernels"] if AVAILABLE else [])]  # on a CPU in the interpreter, which is slow
TOKENS = 77  # past any block of 16


def _scores(kind: str, *size: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if kind == "equal":
        return torch.zeros(size)
    scores = torch.randn(size, generator=generator)
    if kind == "ties":
        return scores.mul(2).round()
    if kind == "zero and one":
        return (scores > 0).float()
    return scores * {"distinct": 1.0, "large": 1e30, "tiny": 1e-30}[kind]


def _expected(scores: Tensor, past: int, budget: int) -> list[int]:
    """Return the positions of the highest scores; of equal ones the earlier ones."""
    count = min(budget, past)
    lowest = scores[:past].topk(count).values[-1] if count else 0.0
    above = [at for at in range(past) if scores[at] > lowest]
    equal = [at for at in range(past) if scores[at] == lowest]
    return sorted(above + equal[: count - len(above)])


CASES = [
    pytest.param(backend, kind, amount, id=f"{backend} {kind} {amount}")
    for backend in BACKENDS
    for kind in ("distinct", "ties", "zero and one", "equal", "large", "tiny")
    for amount in ((0.2, 1, 7, 1.0, 500) if backend == "reference" or DEVICE.type == "cuda" else (7,))
]


@pytest.mark.parametrize(("backend", "kind", "amount"), CASES)
def test_the_highest_within_each_lengths_budget_are_selected(backend, kind, amount) -> None:
    budget = Budget(amount)
    lengths = [TOKENS, 0, 1, 40, 63]
    scores = _scores(kind, 4, 2, TOKENS)
    slots = [3, 0, 4, 2]  # the third is as long as the capacity allows, the others are not
    beyond = torch.arange(TOKENS) >= torch.tensor(lengths)[slots][:, None, None]
    scores = scores.masked_fill(beyond, 1e9)  # what lies beyond is anything
    with force_backend(backend):
        positions, counts = select_topk(
            scores.to(DEVICE), torch.tensor(lengths, device=DEVICE), torch.tensor(slots, device=DEVICE),
            budget.table(TOKENS, DEVICE), budget.tokens(TOKENS),
        )  # fmt: skip
    assert positions.dtype == counts.dtype == torch.int64
    for row, slot in enumerate(slots):
        for head in range(2):
            count = int(counts[row, head])
            expected = _expected(scores[row, head], lengths[slot], budget.tokens(lengths[slot]))
            assert sorted(positions[row, head, :count].tolist()) == expected


def test_one_slot_and_one_token() -> None:
    seq_lens, slots = torch.tensor([1]), torch.tensor([0])
    positions, counts = select_topk(torch.zeros(1, 3, 1), seq_lens, slots, torch.tensor([1, 1]), 1)
    assert positions.tolist() == [[[0]] * 3] and counts.tolist() == [[1] * 3]
