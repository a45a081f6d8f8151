"""Scores before the softmax against products in double precision."""

import math

import pytest
import torch

from sparsecache.kernels.scores import scaled_scores


@pytest.mark.parametrize("batch", [(), (2,)], ids=["prompt", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_scores_are_products_in_float32_of_each_query_with_the_keys_of_its_group(dtype, batch) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(*batch, 33, heads, 24, generator=generator).to(device, dtype) for heads in (6, 2))
    q, k = q.transpose(-3, -2), k.transpose(-3, -2)[..., 5:, :]  # strided, as of a prompt
    found = scaled_scores(q[..., -4:, :], k, 100)
    expected = q[..., -4:, :].double() @ k.double().repeat_interleave(3, -3).mT / math.sqrt(100)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
