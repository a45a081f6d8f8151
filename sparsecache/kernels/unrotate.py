"""Undo RoPE for the keys of a prompt."""

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, tl, triton, use_kernel
from sparsecache.kernels.rotation import Rotation, rotate_rows_back

_BLOCK_T = 16  # tokens of one head per program


def unrotate_keys(k: Tensor, rotation: Rotation) -> Tensor:
    """Return keys k [G, L, D] as they were before RoPE, in the dtype of k: [L, G, D].

    rotation: of the positions 0 to L - 1, or more. Computed in float32. A scale of the rotation is undone too.
    """
    kv_heads, length, head_dim = k.shape
    rotates_head = rotation.cos.shape[1] == head_dim  # the kernel does not rotate parts of a head
    if not (use_kernel(k) and rotates_head):
        of_prompt = Rotation(*(table[:length] for table in rotation))
        return rotate_rows_back(k, of_prompt).to(k.dtype).transpose(0, 1).contiguous()
    out = torch.empty((length, kv_heads, head_dim), device=k.device, dtype=k.dtype)
    half = head_dim // 2
    _unrotate_kernel[(-(-length // _BLOCK_T), kv_heads)](
        k, k.stride(0), k.stride(1), *rotation, out, length, kv_heads, half,
        BLOCK_T=_BLOCK_T, BLOCK_D=next_power_of_2(half), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["length"])
def _unrotate_kernel(  # type: ignore[no-untyped-def]
    keys, head_stride, row_stride, cos, sin, out, length, kv_heads, half,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Undo the rotation of a block of tokens of a KV head."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    kv, channel = tl.program_id(1), tl.arange(0, BLOCK_D)[None, :]
    mask = (token < length) & (channel < half)
    source = keys + kv.to(tl.int64) * head_stride + token * row_stride + channel
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    at_table = token * (2 * half) + channel  # the second half of a table repeats the first
    c, s = tl.load(cos + at_table, mask=mask, other=1.0), tl.load(sin + at_table, mask=mask, other=0.0)
    scale = 1 / (c * c + s * s)
    target = out + (token * kv_heads + kv) * (2 * half) + channel
    tl.store(target, (first * c + second * s) * scale, mask=mask)
    tl.store(target + half, (second * c - first * s) * scale, mask=mask)
