"""Rotary position embeddings (RoPE, arXiv 2104.09864).

Channel i of a head of size D pairs with channel i + D / 2.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, tl, triton, use_kernel

_TOKENS = 16  # tokens of one head per program


class Rotation(NamedTuple):
    """Cosines and sines of N tokens, [N, D] each. The second half of D repeats the first."""

    cos: Tensor
    sin: Tensor


RotationOf = Callable[[Tensor], Rotation]
"""Returns the cosines and sines, [.., R] float32, of positions [..]. The first R channels of a head are rotated."""


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate x [N, heads, D] by the angles of its N tokens."""
    cos, sin = (table[:, None] for table in rotation)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotate_rows(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the first R channels of x [.., D] by cosines and sines [.., R], which broadcast: float32 [.., D]."""
    cos, sin = rotation
    size = cos.shape[-1]
    rotated, rest = x[..., :size].float(), x[..., size:].float()
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, rest.expand(*rotated.shape[:-1], -1)), dim=-1) if rest.shape[-1] else rotated


def rotate_rows_back(x: Tensor, rotation: Rotation) -> Tensor:
    """Return what `rotate_rows` rotated to x. Some RoPE types also scale: that is undone too."""
    cos, sin = rotation
    squared_scale = cos.square() + sin.square()
    return rotate_rows(x, Rotation(cos / squared_scale, -sin / squared_scale))


def split_and_rotate(heads: Tensor, rotation: Rotation, kv_heads: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split projected heads into q, k and v, rotate q and k, and make each head contiguous.

    heads: [N, H + 2G, D], in the order q, k, v. Returns q [H, capacity, D], k and v [G, capacity, D]; rows from N on
    are zeros.
    """
    tokens, count, head_dim = heads.shape
    out = heads.new_empty(count, capacity, head_dim)
    out[:, tokens:] = 0
    q, k, v = out.tensor_split((count - 2 * kv_heads, count - kv_heads))
    if use_kernel(heads):
        half = head_dim // 2
        grid = (-(-tokens // _TOKENS), count)
        block = next_power_of_2(half)
        _split_and_rotate_kernel[grid](
            heads, *rotation, out, tokens, count, count - kv_heads, capacity, half, _TOKENS, block
        )
    else:
        out[: count - kv_heads, :tokens] = rotate(heads[:, : count - kv_heads], rotation).transpose(0, 1)
        v[:, :tokens] = heads[:, count - kv_heads :].transpose(0, 1)
    return q, k, v


# do_not_specialize: one compilation serves all lengths; Triton would compile another for multiples of 16.
@triton.jit(do_not_specialize=["tokens", "capacity"])
def _split_and_rotate_kernel(  # type: ignore[no-untyped-def]
    heads, cos, sin, out, tokens, count, num_rotated, capacity, half, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    head = tl.program_id(1)
    channel = tl.arange(0, BLOCK_D)[None, :]
    mask = (token < tokens) & (channel < half)
    source = heads + (token * count + head) * 2 * half + channel
    first = tl.load(source, mask=mask, other=0.0)
    second = tl.load(source + half, mask=mask, other=0.0)
    if head < num_rotated:
        c = tl.load(cos + token * 2 * half + channel, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(sin + token * 2 * half + channel, mask=mask, other=0.0).to(tl.float32)
        one, two = first.to(tl.float32), second.to(tl.float32)
        first = (one * c - two * s).to(first.dtype)
        second = (two * c + one * s).to(second.dtype)
    target = out + (head.to(tl.int64) * capacity + token) * 2 * half + channel
    tl.store(target, first, mask=mask)
    tl.store(target + half, second, mask=mask)
