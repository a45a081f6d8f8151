"""Sum |skewed queries| or |skewed keys| over a prompt's tokens, per channel.

InfiniGen chooses the channels of its partial keys by these sums.
"""

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, saturating_programs, tl, triton, use_kernel

_REFERENCE_BLOCK = 4096  # tokens that the reference skews at a time, which bounds its memory
_BLOCK_T = 64  # tokens per iteration
_MIN_SPLIT = 512  # tokens
_MAX_CHANNELS = 128  # two matrices of more channels do not fit into shared memory


def skewed_sums(x: Tensor, matrices: Tensor) -> Tensor:
    """Return the sum over tokens of |x A|, float32: [H, D].

    x: [H, L, D], queries or keys; matrices: [G, D, D] float32, an orthogonal A per KV head. For x in half precision,
    the kernel splits A into two matrices of that dtype: A rounded, and the remainder rounded. Each entry of their sum
    differs from that of A by less than 2^-17.
    """
    if use_kernel(x) and x.dtype != torch.float32 and x.shape[2] <= _MAX_CHANNELS:
        return _launch(x, matrices)
    of_heads = matrices.repeat_interleave(len(x) // len(matrices), 0)
    return torch.stack([(part.float() @ of_heads).abs().sum(1) for part in torch.split(x, _REFERENCE_BLOCK, 1)]).sum(0)


def _launch(x: Tensor, matrices: Tensor) -> Tensor:
    heads, length, head_dim = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    splits = max(1, min(saturating_programs(x.device) // heads, length // _MIN_SPLIT))
    sums = torch.empty((splits, heads, head_dim), device=x.device, dtype=torch.float32)
    _sum_kernel[(heads, splits)](
        x, x.stride(0), x.stride(1), matrices.contiguous(), sums, length, head_dim, heads // len(matrices),
        BLOCK_T=_BLOCK_T, BLOCK_D=next_power_of_2(head_dim, 16), num_warps=8, num_stages=3,
    )  # fmt: skip
    return sums.sum(0)


@triton.jit(do_not_specialize=["length"])
def _sum_kernel(  # type: ignore[no-untyped-def]
    x, head_stride, stride, matrices, sums, length, head_dim, group, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Sum over the tokens of one split of a head. A KV head has `group` heads of x."""
    head, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    channel = tl.arange(0, BLOCK_D)
    in_head = channel < head_dim
    at_matrix = matrices + (head // group * head_dim + channel)[:, None] * head_dim + channel[None, :]
    matrix = tl.load(at_matrix, mask=in_head[:, None] & in_head[None, :], other=0.0)
    # Matrix units multiply half precision several times as fast as float32.
    high = matrix.to(x.dtype.element_ty)
    low = (matrix - high.to(tl.float32)).to(x.dtype.element_ty)
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    part = tl.cdiv(tl.cdiv(length, splits), BLOCK_T) * BLOCK_T
    for first in tl.range(split * part, tl.minimum(split * part + part, length), BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        at_tokens = x + head * head_stride + token.to(tl.int64)[:, None] * stride + channel[None, :]
        tile = tl.load(at_tokens, mask=(token < length)[:, None] & in_head[None, :], other=0.0)
        total += tl.abs(tl.dot(tile, low, tl.dot(tile, high)))
    target = sums + (split * tl.num_programs(0) + head) * head_dim + channel
    tl.store(target, tl.sum(total, axis=0), mask=in_head)
