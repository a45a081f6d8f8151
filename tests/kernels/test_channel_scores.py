"""Approximate attention by a few channels: the kernels against the reference, of which tests/methods has the truth."""

import pytest
import torch

from sparsecache.kernels._triton import force_backend
from sparsecache.kernels.channel_scores import (
    add_mean_value,
    append_and_choose,
    approximate_attention,
    select_by_attention,
)

CASES = {  # slots, KV heads, group, head size, channels, capacity, past tokens of the slots of the batch
    "no past token": (2, 1, 2, 16, 3, 20, [0, 0]),
    "around a block": (3, 1, 3, 24, 8, 300, [298, 255]),
    "all channels": (2, 1, 8, 32, 32, 48, [47, 2]),
    "full": (1, 2, 1, 16, 4, 40, [40]),
}
if torch.cuda.is_available():
    CASES["long"] = (16, 8, 4, 128, 32, 8208, [*range(100, 8100, 500)])
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def _inputs(case, device, dtype):
    """Return the arguments of append_and_choose, and how many recent tokens are always selected."""
    slots, kv_heads, group, head_dim, count, capacity, past = case
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    heads = draw(len(past), (group + 2) * kv_heads, 1, head_dim)  # q, k and v share their rows' memory
    q, k, v = heads.tensor_split((group * kv_heads, (group + 1) * kv_heads), dim=1)
    keys, value_sums = draw(slots, kv_heads, head_dim, -(-capacity // 16) * 16), draw(slots, kv_heads, head_dim).float()
    order = torch.randperm(slots, generator=generator)[: len(past)].to(device)
    seq_lens = torch.zeros(slots, dtype=torch.int64, device=device)
    seq_lens[order] = torch.tensor(past, device=device)
    recent = (torch.arange(capacity + 1, device=device) * 0.05).long()
    return (q, k, v, keys, value_sums, seq_lens, order, count), recent


@cases
def test_the_token_is_appended_and_the_largest_channels_are_chosen(case, device, gpu_dtype, agree) -> None:
    def choose(*inputs):
        chosen, scale = append_and_choose(*inputs)
        return chosen.sort(2).values, scale

    agree(choose, *_inputs(case, device, gpu_dtype)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", [case for name, case in CASES.items() if name != "full"])
def test_kernel_and_reference_select_and_weigh_alike(case, dtype, device) -> None:
    """The reference weighs what the kernel selects. Both select alike, but for near-ties at the cut."""
    (q, k, v, keys, value_sums, seq_lens, slots, count), recent = _inputs(case, device, dtype)
    budgets = (torch.arange(len(recent), device=device) * 0.2).long().clamp(min=1)
    channels = append_and_choose(q, k, v, keys, value_sums, seq_lens, slots, count)
    width = min(int(seq_lens.max()) + 1, keys.shape[3])
    attention, selections = {}, {}
    for backend in ("kernels", "reference"):
        with force_backend(backend):
            attention[backend] = approximate_attention(q, channels, keys, seq_lens, slots, recent, width)
            selections[backend] = select_by_attention(
                attention[backend], seq_lens, slots, budgets, recent, int(budgets[-1])
            )
    selected = {backend: _sets(selection) for backend, selection in selections.items()}
    scores = attention["reference"][0].float().logsumexp(2).flatten(0, 1)  # [B G, T], of all query heads together
    for found, expected, of_tokens in zip(selected["kernels"], selected["reference"], scores, strict=True):
        assert len(found) == len(expected)
        if dtype == torch.float32:
            swapped = [of_tokens[sorted(each)].sort().values for each in (found - expected, expected - found)]
            assert (swapped[0] - swapped[1]).abs().le(1e-5).all() and len(swapped[0]) <= 0.01 * len(expected)
        else:
            assert len(found & expected) >= 0.9 * len(expected) - 1e-6
    outs = [
        add_mean_value(q, each, selections["kernels"], value_sums, seq_lens, slots, recent)
        for each in attention.values()
    ]
    assert outs[0].dtype == dtype and outs[0].isfinite().all()
    error = (outs[0].double() - outs[1].double()).norm() / outs[1].double().norm()
    assert error < (1e-5 if dtype == torch.float32 else 5e-3)


def _sets(selection) -> list[set[int]]:
    rows = zip(selection.positions.flatten(0, 1).tolist(), selection.counts.flatten().tolist(), strict=True)
    return [set(positions[:count]) for positions, count in rows]
