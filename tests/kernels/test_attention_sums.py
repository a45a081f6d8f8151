"""The attention that prompt tokens receive, against dense attention."""

import pytest
import torch

from sparsecache.kernels import attention_sums as module
from sparsecache.kernels.attention_sums import attention_sums

CASES = {  # KV heads, group, head size, tokens, first query
    "one token": (1, 2, 16, 1, 0),
    "around a block": (2, 3, 24, 129, 0),
    "last queries": (1, 2, 32, 200, 77),
}
if torch.cuda.is_available():
    CASES |= {"long": (8, 4, 128, 4099, 0), "many last queries": (2, 8, 64, 3001, 1500), "wide": (1, 4, 256, 900, 0)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_and_reference_agree(case, device, dtype, agree, monkeypatch) -> None:
    kv_heads, group, head_dim, length, first = case
    monkeypatch.setattr(module, "_FEW_QUERIES", 0)
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(kv_heads * group, length, head_dim, generator=generator).to(device, dtype)
    k = torch.randn(length, kv_heads, head_dim, generator=generator).to(device, dtype).transpose(0, 1)  # strided
    agree(attention_sums, q, k, first)


@pytest.mark.parametrize("first", [0, 3, 69])
def test_equals_dense_attention(first) -> None:
    q, k = torch.randn(6, 70, 8, dtype=torch.float64), torch.randn(2, 70, 8, dtype=torch.float64)
    scores = q @ k.repeat_interleave(3, 0).mT / 8**0.5
    weights = scores.masked_fill(torch.ones(70, 70).triu(1).bool(), -torch.inf).softmax(-1)
    expected = weights[:, first:].sum(1).view(2, 3, 70).sum(1)
    torch.testing.assert_close(attention_sums(q.float(), k.float(), first), expected.float())
    assert attention_sums(q.float(), k.float(), first).sum() == pytest.approx(6 * (70 - first))
