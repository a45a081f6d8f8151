"""Evictions by attention and by position: the kernels against the references over several steps, and ties."""

import pytest
import torch

from sparsecache.kernels._triton import force_backend
from sparsecache.kernels.eviction import KeptTokens, evict_least_attended
from sparsecache.kernels.oldest import evict_oldest

CASES = {  # slots, KV heads, group, head size, rows, budget, recent, tokens kept and past of the slots of the batch
    "first token": (2, 1, 2, 16, 3, 2, 1, [0], [0]),
    "below and at the budget": (3, 2, 3, 24, 41, 40, 20, [20, 40], [20, 77]),
    "around a block": (3, 2, 1, 16, 261, 260, 130, [127, 260], [127, 300]),
    "budget of one": (1, 1, 8, 32, 2, 1, 1, [1], [9]),
    "all rows in use": (1, 2, 2, 16, 30, 100, 50, [30], [30]),
}
STEPS = 3
if torch.cuda.is_available():
    CASES |= {
        "long": (16, 8, 4, 128, 1640, 1639, 820, [1639] * 12 + [0, 1, 64, 1638], [8192] * 12 + [0, 1, 64, 1638]),
        "every token": (3, 2, 6, 128, 9001, 9000, 4500, [9000, 8999, 17], [9000, 8999, 17]),
    }


def _inputs(case, device, dtype):
    slots, kv_heads, group, head_dim, rows, budget, recent, kept, past = case
    generator = torch.Generator().manual_seed(4)
    keys, values = (torch.randn(slots, kv_heads, rows, head_dim, generator=generator) for _ in range(2))
    q = torch.randn(STEPS, len(past), kv_heads * group, 1, head_dim, generator=generator)
    order = torch.randperm(slots, generator=generator)[: len(past)]
    positions, scores = torch.full((slots, kv_heads, rows), -1), torch.rand(slots, kv_heads, rows, generator=generator)
    num_tokens, seq_lens = torch.zeros(slots, kv_heads, dtype=torch.int64), torch.zeros(slots, dtype=torch.int64)
    for slot, count, tokens in zip(order.tolist(), kept, past, strict=True):
        positions[slot, :, :count] = torch.randperm(tokens, generator=generator)[:count]
        num_tokens[slot], seq_lens[slot] = count, tokens
    tables = [torch.full((max(*past, rows) + STEPS + 1,), number) for number in (budget, recent)]
    floats = [x.to(device, dtype) for x in (q, keys, values)]
    return *floats, *(x.to(device) for x in (positions, scores, num_tokens, seq_lens, order, *tables))


def _evict(q, keys, values, positions, scores, num_tokens, seq_lens, slots, budgets, recent, **options):
    tokens = KeptTokens(keys, values, positions, scores, num_tokens)
    for of_step in q:
        evict_least_attended(of_step, tokens, seq_lens, slots, budgets, recent, **options)
        seq_lens[slots] += 1
    in_use = torch.arange(keys.shape[2], device=keys.device) < num_tokens[..., None]
    scores.masked_fill_(~in_use, 0)
    positions.masked_fill_(~in_use, -1)


@pytest.mark.parametrize(("accumulate", "shared"), [(True, False), (False, True)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_and_reference_agree(case, accumulate, shared, device, gpu_dtype, agree) -> None:
    inputs = _inputs(case, device, gpu_dtype)
    if shared:
        inputs[3].copy_(inputs[3][:, :1].expand_as(inputs[3]))
    agree(_evict, *inputs, accumulate=accumulate, shared=shared)


@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_of_equal_scores_the_earliest_leaves(backend, device) -> None:
    """Equal keys have equal attention. The first two positions are in the last rows."""
    inputs = _inputs((1, 1, 2, 16, 9, 8, 2, [8], [8]), device, torch.float32)
    q, keys, positions = inputs[0], inputs[1], inputs[3]
    q[:], keys[:] = 0.5, 1.0  # whose products are exact
    positions[0, 0, :8] = torch.arange(7, -1, -1)
    with force_backend(backend):
        _evict(*inputs, accumulate=False, shared=False)
    assert positions[0, 0].tolist() == [7, 6, 5, 4, 3, 10, 9, 8, -1]


@pytest.mark.parametrize("sinks", [0, 3, 1000])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_oldest_kernel_and_reference_agree(case, sinks, device, gpu_dtype, agree) -> None:
    def evict(keys, values, positions, scores, num_tokens, seq_lens, slots, budgets):
        for _ in range(STEPS):
            evict_oldest(KeptTokens(keys, values, positions, scores, num_tokens), seq_lens, slots, budgets, sinks)
            seq_lens[slots] += 1
        positions.masked_fill_(torch.arange(keys.shape[2], device=device) >= num_tokens[..., None], -1)

    _, keys, values, positions, scores, *rest, _ = _inputs(case, device, gpu_dtype)
    agree(evict, keys, values, positions, torch.zeros_like(scores), *rest)
