"""Scores by a few channels of each query, against the reference and against a loop."""

import pytest
import torch

from sparsecache.kernels.channel_scores import channel_scores

CASES = {  # slots, KV heads, group, head size, channels, capacity, width, past tokens of the slots of the batch
    "one token": (1, 1, 2, 16, 3, 16, 1, [0]),
    "around a block": (3, 2, 3, 24, 8, 304, 300, [299, 255]),
    "all channels": (2, 1, 8, 32, 32, 48, 40, [39, 2]),
}
if torch.cuda.is_available():
    CASES["long"] = (16, 8, 4, 128, 32, 8208, 8193, [*range(100, 8100, 500)])


def _inputs(case, device, dtype):
    slots, kv_heads, group, head_dim, count, capacity, width, past = case
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(len(past), kv_heads, group, head_dim, generator=generator).to(device, dtype)
    keys = torch.randn(slots, kv_heads, head_dim, capacity, generator=generator).to(device, dtype)
    channels = torch.rand(len(past), kv_heads, head_dim, generator=generator).topk(count).indices.to(device)
    scale = (1 + torch.rand(len(past), kv_heads, group, generator=generator)).to(device)
    order = torch.randperm(slots, generator=generator)[: len(past)].to(device)
    seq_lens = torch.zeros(slots, dtype=torch.int64, device=device)
    seq_lens[order] = torch.tensor(past, device=device)
    return q, channels, scale, keys, seq_lens, order, width


def _finite(*inputs):
    scores = channel_scores(*inputs)
    return scores.isfinite(), scores.masked_fill(scores.isinf(), 0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_and_reference_agree(case, device, dtype, agree) -> None:
    agree(_finite, *_inputs(case, device, dtype))


def test_equals_a_loop() -> None:
    q, channels, scale, keys, seq_lens, slots, width = _inputs(CASES["around a block"], "cpu", torch.float32)
    scores = channel_scores(q, channels, scale, keys, seq_lens, slots, width)
    for b, g, h, t in ((0, 0, 0, 0), (1, 1, 2, 255), (0, 1, 1, 299)):
        expected = sum(q[b, g, h, c] * keys[slots[b], g, c, t] for c in channels[b, g]) / scale[b, g, h]
        assert scores[b, g, h, t] == pytest.approx(float(expected), rel=1e-5)
    assert (scores[1, :, :, 256:] == -torch.inf).all() and scores[1, :, :, :256].isfinite().all()
