"""Evictions by importance and redundancy: the kernels against the reference over several steps."""

import pytest
import torch

from sparsecache.kernels.eviction import KeptTokens
from sparsecache.kernels.redundancy import Redundancy, evict_redundant

CASES = {  # slots, KV heads, group, head size, window, rows, budget, tokens kept and past of the slots of the batch
    "first token": (2, 1, 2, 16, 8, 3, 2, [0], [0]),
    "below and at the budget": (3, 2, 3, 24, 5, 41, 40, [20, 40], [20, 77]),
    "around a block": (2, 1, 1, 16, 16, 281, 280, [127, 280], [127, 300]),
    "window above the budget": (1, 1, 8, 32, 8, 6, 5, [5], [9]),
}
STEPS = 4
if torch.cuda.is_available():
    CASES["long"] = (16, 8, 4, 128, 8, 1640, 1639, [1639] * 12 + [0, 1, 64, 1638], [8192] * 12 + [0, 1, 64, 1638])


def _inputs(case, device, dtype):
    slots, kv_heads, group, head_dim, window, rows, budget, kept, past = case
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    centres = draw(5, head_dim)
    new = draw(STEPS, len(past), kv_heads, head_dim) + centres[torch.arange(STEPS) % 5][:, None, None]
    keys = draw(slots, kv_heads, rows, head_dim) + centres[torch.arange(rows) % 5]
    values, queries = draw(slots, kv_heads, rows, head_dim), draw(slots, kv_heads, group, window, head_dim)
    q = draw(STEPS, len(past), kv_heads * group, 1, head_dim)
    order = torch.randperm(slots, generator=generator)[: len(past)]
    positions, exempted = (torch.full((slots, kv_heads, rows), -1) for _ in range(2))
    scores, similarity = torch.rand(2, slots, kv_heads, rows, generator=generator)
    num_tokens, seq_lens = torch.zeros(slots, kv_heads, dtype=torch.int64), torch.zeros(slots, dtype=torch.int64)
    for slot, count, tokens in zip(order.tolist(), kept, past, strict=True):
        positions[slot, :, :count] = torch.randperm(tokens, generator=generator)[:count]
        exempted[slot, :, :count] = torch.randint(-1, max(1, count), (kv_heads, count), generator=generator)
        num_tokens[slot], seq_lens[slot] = count, tokens
    budgets = torch.full((max(*past, rows) + STEPS + 1,), budget)
    floats = [x.to(device, dtype) for x in (q, new, keys, values, queries)]
    others = (positions, 9 * scores, similarity, exempted, num_tokens, seq_lens, order, budgets)
    return *floats, *(x.to(device) for x in others)


def _evict(
    q, new, keys, values, queries, positions, scores, similarity, exempted, num_tokens, seq_lens, slots, budgets
):
    tokens = KeptTokens(keys, values, positions, scores, num_tokens)
    state = Redundancy(exempted, similarity, queries, 0.5, 0.1)
    heads = torch.arange(keys.shape[1], device=keys.device)
    for of_step, key in zip(q, new, strict=True):
        keys[slots[:, None], heads, num_tokens[slots].clamp(max=keys.shape[2] - 1)] = key
        evict_redundant(of_step, tokens, state, seq_lens, slots, budgets)
        seq_lens[slots] += 1
    is_free = torch.arange(keys.shape[2], device=keys.device) >= num_tokens[..., None]
    for rows in (positions, scores, exempted, similarity):
        rows.masked_fill_(is_free, 0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_and_reference_agree(case, device, gpu_dtype, agree) -> None:
    agree(_evict, *_inputs(case, device, gpu_dtype))
