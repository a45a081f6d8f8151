"""The middle of a SwiGLU (arXiv 2002.05202): silu(gate) * up."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from sparsecache.kernels._triton import tl, triton, use_kernel

_BLOCK = 1024


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [N, 2 * I], gate first: [N, I]."""
    if use_kernel(gate_up):
        return _kernel(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def _kernel(gate_up: Tensor) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), device=gate_up.device, dtype=gate_up.dtype)
    _swiglu[(rows, -(-width // _BLOCK))](gate_up, out, width, _BLOCK)
    return out


@triton.jit
def _swiglu(gate_up, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, gate / (1.0 + tl.exp(-gate)) * up, mask=there)
