"""The attention that prompt tokens receive, against dense attention."""

import math

import pytest
import torch
from torch import Tensor

from sparsecache.kernels.attention_sums import attention_sums

CASES = {  # KV heads, group, head size, tokens, first query
    "one token": (1, 2, 16, 1, 0),
    "around a block": (2, 3, 24, 129, 0),
    "last queries": (1, 2, 32, 300, 77),
    "a window": (2, 2, 16, 200, 168),
    "the last query": (1, 3, 16, 130, 129),
}
if torch.cuda.is_available():
    CASES |= {"long": (8, 4, 128, 4099, 0), "many last queries": (2, 8, 64, 3001, 1500), "wide": (1, 4, 256, 900, 0)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_and_reference_agree(case, device, dtype, agree) -> None:
    kv_heads, group, head_dim, length, first = case
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(kv_heads * group, length, head_dim, generator=generator).to(device, dtype)
    k = torch.randn(length, kv_heads, head_dim, generator=generator).to(device, dtype).transpose(0, 1)  # strided
    agree(attention_sums, q, k, first)
    agree(attention_sums, q, k, first, _dense_scores(q, k).logsumexp(-1))


@pytest.mark.parametrize("first", [0, 3, 69])
def test_equals_dense_attention(first) -> None:
    q, k = torch.randn(6, 70, 8, dtype=torch.float64), torch.randn(2, 70, 8, dtype=torch.float64)
    scores = _dense_scores(q, k)
    expected = scores.softmax(-1)[:, first:].sum(1).view(2, 3, 70).sum(1).float()
    q, k, logsumexp = q.float(), k.float(), scores.logsumexp(-1).float()
    torch.testing.assert_close(attention_sums(q, k, first), expected)
    assert attention_sums(q, k, first).sum() == pytest.approx(6 * (70 - first))
    torch.testing.assert_close(attention_sums(q, k, first, logsumexp), expected)
    torch.testing.assert_close(attention_sums(q, k, first, logsumexp + math.log(2)), expected / 2)


def _dense_scores(q: Tensor, k: Tensor) -> Tensor:
    """Return the scores [H, L, L] of q [H, L, D] and k [G, L, D], -inf for later tokens, at least in float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).repeat_interleave(len(q) // len(k), 0).mT / q.shape[2] ** 0.5
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
