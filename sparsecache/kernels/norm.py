"""RMS norm (arXiv 1910.07467) over the last dimension, computed in float32."""

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_launch, pdl_options, pdl_wait, tl, triton, use_kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight.

    x: [.., D]; weight: [D]. As in transformers, the result is rounded to the dtype of x before the weight is applied.
    """
    if use_kernel(x):
        return _launch(x, weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _launch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(rows.shape)
    if not rows.numel():
        return out.view(x.shape)
    block = next_power_of_2(rows.shape[1])
    warps = min(16, max(1, block // 512))
    _rms_norm_kernel[(len(rows),)](
        rows, rows.stride(0), weight, out, rows.shape[1], eps, BLOCK=block, num_warps=warps, **pdl_options()
    )
    return out.view(x.shape)


@triton.jit
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x, row_stride, weight, out, size, eps, BLOCK: tl.constexpr, USE_PDL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < size
    gain = tl.load(weight + column, mask=mask, other=0.0)  # before the wait: no kernel writes weights
    pdl_wait(USE_PDL)
    wide = tl.load(x + row * row_stride + column, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide) / size + eps)
    pdl_launch(USE_PDL)
    normed = (wide * scale).to(out.dtype.element_ty)
    tl.store(out + row * size + column, normed * gain, mask=mask)
