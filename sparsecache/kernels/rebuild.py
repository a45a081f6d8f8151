"""Rebuild selected keys from a low rank, as in ShadowKV: products of coefficients and a basis, then RoPE."""

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_options, pdl_wait, tl, triton, use_kernel
from sparsecache.kernels.rotation import Rotation, rotate_rows
from sparsecache.kernels.rows import index_slots, mask_of_first, take_rows

_BLOCK_N, _BLOCK_R = 64, 32  # tokens per program, coefficients at a time


def rebuild_rows(
    coefficients: Tensor,
    basis: Tensor,
    values: Tensor | None,
    rotation: Rotation,
    slots: Tensor,
    positions: Tensor,
    counts: Tensor,
) -> Tensor:
    """Return keys and values of positions, undefined beyond the counts: [B, G, N, 2, D].

    coefficients: [slots, T, R]; basis: [slots, G, R, D]; values: [slots, G, T, D], None: those returned are undefined.
    rotation: of the positions 0 to T - 1. slots: [B] int64; positions: [B, G, N] int64, the first counts [B, G] (int64)
    of a KV head below T.
    """
    kv_heads, rank, head_dim = basis.shape[1:]
    batch, _, width = positions.shape
    whole = rotation.cos.shape[1] == head_dim  # the kernel does not rotate parts of a head
    if not (use_kernel(positions) and whole):
        rows = positions.masked_fill(~mask_of_first(counts, width), 0)
        plain = coefficients[slots[:, None, None], rows] @ index_slots(basis, slots)
        keys = rotate_rows(plain, Rotation(*(table[rows] for table in rotation))).to(plain.dtype)
        return torch.stack((keys, keys if values is None else take_rows(values, slots, rows)), 3)
    out = torch.empty((batch, kv_heads, width, 2, head_dim), device=positions.device, dtype=basis.dtype)
    half = head_dim // 2
    _rebuild_kernel[(batch * kv_heads, -(-width // _BLOCK_N))](
        coefficients, basis, coefficients if values is None else values, *rotation, slots, positions.contiguous(),
        counts.contiguous(), out, kv_heads, coefficients.shape[1], width, rank, half, HAS_VALUES=values is not None,
        BLOCK_N=_BLOCK_N, BLOCK_R=_BLOCK_R, BLOCK_D=next_power_of_2(half, 16), num_warps=4, **pdl_options(),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["capacity", "width"])
def _rebuild_kernel(  # type: ignore[no-untyped-def]
    coefficients, basis, values, cos, sin, slots, positions, counts, out, kv_heads, capacity, width, rank, half,
    HAS_VALUES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """Rebuild and rotate a block of keys of one slot and KV head, and copy their values."""
    pdl_wait(USE_PDL)
    head, first_token = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N
    count = tl.load(counts + head)
    if first_token >= count:
        return
    owner = tl.load(slots + head // kv_heads) * kv_heads + head % kv_heads
    token, channel = first_token + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    is_valid = token < count
    position = tl.load(positions + head * width + token, mask=is_valid, other=0)
    first = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)  # channels of the first half
    second = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in range(0, rank, BLOCK_R):
        factor = start + tl.arange(0, BLOCK_R)
        row = owner // kv_heads * capacity + position
        of_tokens = tl.load(
            coefficients + row[:, None] * rank + factor[None, :],
            mask=is_valid[:, None] & (factor < rank)[None, :], other=0.0,
        )  # fmt: skip
        at_basis = basis + (owner * rank + factor)[:, None] * (2 * half) + channel[None, :]
        basis_mask = (factor < rank)[:, None] & (channel < half)[None, :]
        low, high = tl.load(at_basis, mask=basis_mask, other=0.0), tl.load(at_basis + half, mask=basis_mask, other=0.0)
        first = tl.dot(of_tokens, low, first, input_precision="ieee")
        second = tl.dot(of_tokens, high, second, input_precision="ieee")
    mask = is_valid[:, None] & (channel < half)[None, :]
    at_table = position[:, None] * (2 * half) + channel[None, :]  # the second half of a table repeats the first
    c, s = tl.load(cos + at_table, mask=mask, other=0.0), tl.load(sin + at_table, mask=mask, other=0.0)
    target = out + (head * width + token)[:, None] * (4 * half) + channel[None, :]
    tl.store(target, first * c - second * s, mask=mask)
    tl.store(target + half, second * c + first * s, mask=mask)
    if HAS_VALUES:
        at_value = values + (owner * capacity + position)[:, None] * (2 * half) + channel[None, :]
        tl.store(target + 2 * half, tl.load(at_value, mask=mask), mask=mask)
        tl.store(target + 3 * half, tl.load(at_value + half, mask=mask), mask=mask)
