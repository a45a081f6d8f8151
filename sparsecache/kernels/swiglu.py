"""SwiGLU activation (arXiv 2002.05202): silu(gate) * up."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from sparsecache.kernels._triton import tl, triton, use_kernel

_BLOCK = 1024


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up: [N, I].

    gate_up: [N, 2 * I], the gate first.
    """
    if use_kernel(gate_up):
        return _launch(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def _launch(gate_up: Tensor) -> Tensor:
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), device=gate_up.device, dtype=gate_up.dtype)
    _swiglu_kernel[(rows, -(-size // _BLOCK))](gate_up, out, size, _BLOCK)
    return out


@triton.jit
def _swiglu_kernel(gate_up, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    gate = tl.load(gate_up + row * 2 * size + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, gate / (1.0 + tl.exp(-gate)) * up, mask=mask)
