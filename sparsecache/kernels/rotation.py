"""Rotary position embeddings (arXiv 2104.09864) applied: the halves of a head are the pairs' two parts."""

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, tl, triton, use_kernel

_TOKENS = 16  # of one head that a program turns


class Rotation(NamedTuple):
    """Cosines and sines [N, D] of N tokens; the second half of D repeats the first."""

    cos: Tensor
    sin: Tensor


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotates x [N, heads, D], whose N tokens are those of the rotation."""
    cos, sin = (table[:, None] for table in rotation)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def split_and_rotate(heads: Tensor, rotation: Rotation, kv_heads: int, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """heads [N, H + 2G, D], as projected (q, k, v), to linear_rope q [H, room, D] and k, and v, [G, room, D].

    Each head's tokens lie together, as attention wants them. Rows from N on are zeros.
    """
    tokens, count, head_dim = heads.shape
    out = heads.new_empty(count, room, head_dim)
    out[:, tokens:] = 0
    q, k, v = out.tensor_split((count - 2 * kv_heads, count - kv_heads))
    if use_kernel(heads):
        half = head_dim // 2
        grid = (-(-tokens // _TOKENS), count)
        block = next_power_of_2(half)
        _split_and_rotate[grid](heads, *rotation, out, tokens, count, count - kv_heads, room, half, _TOKENS, block)
    else:
        out[: count - kv_heads, :tokens] = rotate(heads[:, : count - kv_heads], rotation).transpose(0, 1)
        v[:, :tokens] = heads[:, count - kv_heads :].transpose(0, 1)
    return q, k, v


@triton.jit(do_not_specialize=["tokens", "room"])  # one kernel for all lengths, not another for multiples of 16
def _split_and_rotate(  # type: ignore[no-untyped-def]
    heads, cos, sin, out, tokens, count, turning, room, half, TOKENS: tl.constexpr, HALF: tl.constexpr
):
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    head = tl.program_id(1)
    at = tl.arange(0, HALF)[None, :]
    there = (token < tokens) & (at < half)
    source = heads + (token * count + head) * 2 * half + at
    first = tl.load(source, mask=there, other=0.0)
    second = tl.load(source + half, mask=there, other=0.0)
    if head < turning:
        c = tl.load(cos + token * 2 * half + at, mask=there, other=0.0).to(tl.float32)
        s = tl.load(sin + token * 2 * half + at, mask=there, other=0.0).to(tl.float32)
        one, two = first.to(tl.float32), second.to(tl.float32)
        first = (one * c - two * s).to(first.dtype)
        second = (two * c + one * s).to(second.dtype)
    target = out + (head.to(tl.int64) * room + token) * 2 * half + at
    tl.store(target, first, mask=there)
    tl.store(target + half, second, mask=there)
