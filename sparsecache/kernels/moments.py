"""Moments of a prompt's queries or keys over its tokens, and the expected logits of keys from moments of queries.

On a GPU the tokens are read once, in their dtype. Sums and products are added in float32.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, saturating_programs, tl, triton, use_kernel
from sparsecache.kernels.rotation import Rotation, rotate_rows_back

_BLOCK_T = 64  # tokens per iteration of the moments
_LOGITS_BLOCK_T = 128  # tokens per program of the logits
_WARPS = 8
_MIN_SPLIT = 512  # tokens


class Moments(NamedTuple):
    """Sums over the tokens of each head, float32. On a GPU both are parts of one tensor.

    sums: [H, D], of the values or of their absolute values. products: [H, D, D], x^T x.
    """

    sums: Tensor
    products: Tensor


def token_moments(
    x: Tensor, rotation: Rotation | None = None, absolute: bool = False, groups: int | None = None
) -> Moments:
    """Return the moments of x [H, L, D] over its L tokens.

    rotation: cosines and sines [L, R] that rotated x; the moments are then those of x before its rotation. absolute:
    sum absolute values instead of values. groups: number of groups of H / groups adjacent heads; the moments are summed
    per group, [groups, ..]. By default every head is a group.
    """
    groups = len(x) if groups is None else groups
    if use_kernel(x):
        return _launch(x, rotation, absolute, groups)
    sums, products = [], []
    for head in x:  # one at a time, since tokens in float32 take much memory
        tokens = head.float() if rotation is None else rotate_rows_back(head, rotation)
        sums.append((tokens.abs() if absolute else tokens).sum(0))
        products.append(tokens.mT @ tokens)
    by_group = (torch.stack(parts) for parts in (sums, products))
    return Moments(*(parts.view(groups, -1, *parts.shape[1:]).sum(1) for parts in by_group))


def expected_logits(k: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Return log E[exp(q . k / sqrt(D))] per key k, for normally distributed queries q: [H, L] float32.

    This is mean . k / sqrt(D) + k^T covariance k / 2D. k: [G, L, D]. mean: [H, D] float32 and covariance: [H, D, D]
    float32, of the queries of each head.
    """
    (kv_heads, length, head_dim), heads = k.shape, len(mean)
    if use_kernel(k) and k.dtype != torch.float32:  # products of float32 tiles do not fit into registers
        k = k if k.stride(2) == 1 else k.contiguous()
        logits = torch.empty((heads, length), device=k.device, dtype=torch.float32)
        _logits_kernel[(-(-length // _LOGITS_BLOCK_T), kv_heads)](
            k, k.stride(0), k.stride(1), mean.contiguous(), covariance.contiguous(), logits, 1 / math.sqrt(head_dim),
            0.5 / head_dim, length, head_dim, GROUP=heads // kv_heads, BLOCK_T=_LOGITS_BLOCK_T,
            BLOCK_D=next_power_of_2(head_dim, 16), num_warps=_WARPS, num_stages=1,
        )  # fmt: skip
        return logits
    keys = k.float().repeat_interleave(heads // kv_heads, 0)
    by_mean = mean[:, None] / math.sqrt(head_dim)
    return (torch.baddbmm(by_mean, keys, covariance, alpha=0.5 / head_dim) * keys).sum(2)


def _launch(x: Tensor, rotation: Rotation | None, absolute: bool, groups: int) -> Moments:
    """Launch the kernel of `token_moments`, and add up its splits and the heads of a group."""
    heads, length, head_dim = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    splits = max(1, min(saturating_programs(x.device) // heads, length // _MIN_SPLIT))
    size = (splits, heads, head_dim + 1, head_dim)  # products, then sums
    moments = torch.empty(size, device=x.device, dtype=torch.float32)
    cos, sin = (x, x) if rotation is None else (table.contiguous() for table in rotation)
    _moments_kernel[(heads, splits)](
        x, x.stride(0), x.stride(1), cos, sin, moments, length, head_dim,
        0 if rotation is None else cos.shape[1], ROTATED=rotation is not None, ABSOLUTE=absolute, SPLITS=splits,
        BLOCK_T=_BLOCK_T, BLOCK_D=next_power_of_2(head_dim, 16), num_warps=_WARPS,
        num_stages=1 if rotation is not None or head_dim * x.element_size() > 256 else 3,  # shared memory is scarce
    )  # fmt: skip
    moments = moments.view(splits, groups, -1, *size[2:]).sum((0, 2))
    return Moments(moments[:, head_dim], moments[:, :head_dim])


@triton.jit(do_not_specialize=["length"])
def _moments_kernel(  # type: ignore[no-untyped-def]
    x, head_stride, stride, cos, sin, moments, length, head_dim, rotated_dim,
    ROTATED: tl.constexpr, ABSOLUTE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum over the tokens of one split of a head. rotated_dim: how many channels are rotated."""
    head, split, channel = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK_D)
    in_head = channel < head_dim
    base = x + head * head_stride
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    product = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
    part = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_T) * BLOCK_T
    half = rotated_dim // 2
    is_first, is_rotated = channel < half, channel < rotated_dim
    partner = tl.where(is_first, channel + half, channel - half)
    for first in tl.range(split * part, tl.minimum(split * part + part, length), BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        row = base + token.to(tl.int64)[:, None] * stride
        mask = (token < length)[:, None] & in_head[None, :]
        tile = tl.load(row + channel[None, :], mask=mask, other=0.0)
        if ROTATED:
            rotated_mask = (token < length)[:, None] & is_rotated[None, :]
            other = tl.load(row + partner[None, :], mask=rotated_mask, other=0.0).to(tl.float32)
            at = token[:, None] * rotated_dim + (channel % half)[None, :]
            c = tl.load(cos + at, mask=rotated_mask, other=1.0).to(tl.float32)
            s = tl.load(sin + at, mask=rotated_mask, other=0.0).to(tl.float32)
            other = tl.where(is_first[None, :], other, -other)
            tile = ((tile.to(tl.float32) * c + other * s) / (c * c + s * s)).to(tile.dtype)
        wide = tile.to(tl.float32)
        total += tl.abs(wide) if ABSOLUTE else wide
        product = tl.dot(tl.trans(tile), tile, product, input_precision="ieee")
    target = moments + (split * tl.num_programs(0) + head) * (head_dim + 1) * head_dim + channel
    tl.store(target + head_dim * head_dim, tl.sum(total, axis=0), mask=in_head)
    target = target[None, :] + channel[:, None] * head_dim
    tl.store(target, product, mask=in_head[:, None] & in_head[None, :])


@triton.jit(do_not_specialize=["length"])
def _logits_kernel(  # type: ignore[no-untyped-def]
    k, head_stride, stride, mean, covariance, logits, scale, square_scale, length, head_dim,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the expected logits of BLOCK_T tokens of a KV head for each of its query heads."""
    kv, channel = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_D)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_head = channel < head_dim
    source = k + kv * head_stride + token.to(tl.int64)[:, None] * stride + channel[None, :]
    key = tl.load(source, mask=(token < length)[:, None] & in_head[None, :], other=0.0)
    wide = key.to(tl.float32)
    square = in_head[:, None] & in_head[None, :]
    for group_head in range(GROUP):
        head = kv * GROUP + group_head
        at_covariance = covariance + (head * head_dim + channel)[:, None] * head_dim + channel[None, :]
        matrix = tl.load(at_covariance, mask=square, other=0.0)
        high = matrix.to(key.dtype)
        product = tl.dot(key, high)  # the matrix is the sum of two in the dtype of the keys; one would lose precision
        product = tl.dot(key, (matrix - high.to(tl.float32)).to(key.dtype), product)
        by_mean = tl.load(mean + head * head_dim + channel, mask=in_head, other=0.0)
        score = tl.sum(wide * (product * square_scale + by_mean[None, :] * scale), axis=1)
        tl.store(logits + head * length + token, score, mask=token < length)
