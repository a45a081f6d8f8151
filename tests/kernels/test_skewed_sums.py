"""Sums of skewed tokens: the kernel and the reference against double precision."""

import pytest
import torch

from sparsecache.kernels._triton import force_backend
from sparsecache.kernels.skewed_sums import skewed_sums

CASES = {  # KV heads, group, tokens, head size
    "one token": (1, 2, 1, 16),
    "around a block": (2, 1, 65, 24),
    "some splits": (1, 2, 1100, 16),
}
if torch.cuda.is_available():
    CASES |= {"long": (8, 4, 32769, 128), "96 channels": (2, 3, 3000, 96), "wide": (1, 4, 900, 256)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_and_reference_are_near_double_precision(case, device, gpu_dtype) -> None:
    kv_heads, group, length, head_dim = case
    dtype = torch.float16 if device.type == "cpu" else gpu_dtype  # the kernel takes half precision only
    generator = torch.Generator().manual_seed(length)
    matrices = torch.linalg.qr(torch.randn(kv_heads, head_dim, head_dim, generator=generator))[0].to(device)
    x = torch.randn(length, kv_heads * group, head_dim, generator=generator).transpose(0, 1).to(device, dtype)
    truth = (x.double() @ matrices.double().repeat_interleave(group, 0)).abs().sum(1)
    for backend in ("kernels", "reference"):
        with force_backend(backend):
            sums = skewed_sums(x, matrices)
        torch.testing.assert_close(sums.double(), truth, rtol=3e-5, atol=1e-5)
