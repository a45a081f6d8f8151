"""RMS norm (arXiv 1910.07467), in float32, over the last dimension."""

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_launch, pdl_options, pdl_wait, tl, triton, use_kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight for x [.., D], rounded to its dtype before the weight, as in transformers."""
    if use_kernel(x):
        return _kernel(x, weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _kernel(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(rows.shape)
    if not rows.numel():
        return out.view(x.shape)
    block = next_power_of_2(rows.shape[1])
    warps = min(16, max(1, block // 512))
    _rms_norm[(len(rows),)](
        rows, rows.stride(0), weight, out, rows.shape[1], eps, BLOCK=block, num_warps=warps, **pdl_options()
    )
    return out.view(x.shape)


@triton.jit
def _rms_norm(  # type: ignore[no-untyped-def]
    x, stride, weight, out, size, eps, BLOCK: tl.constexpr, USE_PDL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < size
    pdl_wait(USE_PDL)
    gain = tl.load(weight + at, mask=there, other=0.0)
    wide = tl.load(x + row * stride + at, mask=there, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide) / size + eps)
    pdl_launch(USE_PDL)
    normed = (wide * scale).to(out.dtype.element_ty)
    tl.store(out + row * size + at, normed * gain, mask=there)
