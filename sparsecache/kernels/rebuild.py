"""Rebuild selected keys from a low-rank factorisation, and store exact keys and values of tokens, as in ShadowKV."""

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_options, pdl_wait, tl, triton, use_kernel
from sparsecache.kernels.rotation import Rotation, rotate_rows
from sparsecache.kernels.rows import index_slots, mask_of_first, take_rows

_BLOCK_N, _BLOCK_R = 64, 32  # tokens per program, coefficients per iteration


def rebuild_rows(
    coefficients: Tensor,
    basis: Tensor,
    values: Tensor | None,
    places: Tensor,
    rotation: Rotation,
    slots: Tensor,
    positions: Tensor,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return keys and values at positions [B, G, N, 2, D], and the positions' places [B, G, N] int32.

    A key is the product of its coefficients and the basis, rotated by RoPE. coefficients: [slots, T, R]; basis: [slots,
    G, R, D]; values: [slots, G, T, D], or None to leave the returned values undefined. places: [slots, G, T] int32, a
    token's row among the exact rows, -1 for none. rotation: of the positions 0 to T - 1. slots: [B] int64. positions:
    [B, G, N] int64, the first counts [B, G] (int64) of a KV head valid and below T.

    The keys and values of tokens with an exact row are undefined, and so is everything beyond the counts.
    """
    kv_heads, rank, head_dim = basis.shape[1:]
    batch, _, width = positions.shape
    rotates_head = rotation.cos.shape[1] == head_dim  # the kernel does not rotate parts of a head
    if not (use_kernel(positions) and rotates_head):
        rows = positions.masked_fill(~mask_of_first(counts, width), 0)
        unrotated = coefficients[slots[:, None, None], rows] @ index_slots(basis, slots)
        keys = rotate_rows(unrotated, Rotation(*(table[rows] for table in rotation))).to(unrotated.dtype)
        rebuilt = torch.stack((keys, keys if values is None else take_rows(values, slots, rows)), 3)
        return rebuilt, index_slots(places, slots).gather(2, rows)
    out = torch.empty((batch, kv_heads, width, 2, head_dim), device=positions.device, dtype=basis.dtype)
    found_places = torch.empty((batch, kv_heads, width), device=positions.device, dtype=torch.int32)
    half = head_dim // 2
    _rebuild_kernel[(batch * kv_heads, -(-width // _BLOCK_N))](
        coefficients, basis, coefficients if values is None else values, places, *rotation, slots,
        positions.contiguous(), counts.contiguous(), out, found_places, kv_heads, coefficients.shape[1], width, rank,
        half, HAS_VALUES=values is not None, BLOCK_N=_BLOCK_N, BLOCK_R=_BLOCK_R, BLOCK_D=next_power_of_2(half, 16),
        num_warps=8, **pdl_options(),
    )  # fmt: skip
    return out, found_places


def append_exact(
    k: Tensor, v: Tensor, exact: Tensor, places: Tensor, seq_lens: Tensor, offsets: Tensor, slots: Tensor
) -> None:
    """Append one token's key and value to the exact rows of each slot, and set the token's place.

    k, v: [B, G, 1, D]; exact: [slots, G, E, 2, D]; places: [slots, G, T] int32, changed in place; seq_lens: [slots]
    int64, past tokens; offsets: [slots] int64, position minus place; slots: [B] int64. A full slot overwrites its last
    row.
    """
    batch, kv_heads, _, head_dim = k.shape
    capacity, tokens = exact.shape[2], places.shape[2]
    if use_kernel(k):
        _append_exact_kernel[(batch * kv_heads,)](
            k, v, k.stride(0), k.stride(1), exact, places, seq_lens, offsets, slots, kv_heads, capacity, tokens,
            head_dim, BLOCK_D=next_power_of_2(head_dim), num_warps=1, **pdl_options(),
        )  # fmt: skip
        return
    position = seq_lens[slots].clamp(max=tokens - 1)
    place = (position - offsets[slots]).clamp(0, capacity - 1)
    exact[slots, :, place] = torch.cat((k, v), 2)
    places[slots, :, position] = place[:, None].expand(-1, kv_heads).int()


@triton.jit(do_not_specialize=["capacity", "width"])
def _rebuild_kernel(  # type: ignore[no-untyped-def]
    coefficients, basis, values, places, cos, sin, slots, positions, counts, out, found_places, kv_heads, capacity,
    width, rank, half,
    HAS_VALUES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """Rebuild and rotate a block of keys of one slot and KV head, and copy their values.

    Tokens with an exact row are skipped.
    """
    pdl_wait(USE_PDL)
    head, first_token = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N
    count = tl.load(counts + head)
    if first_token >= count:
        return
    owner = tl.load(slots + head // kv_heads) * kv_heads + head % kv_heads
    token, channel = first_token + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    is_valid = token < count
    position = tl.load(positions + head * width + token, mask=is_valid, other=0)
    place = tl.load(places + owner * capacity + position, mask=is_valid, other=0)
    tl.store(found_places + head * width + token, place, mask=is_valid)
    is_valid &= place < 0
    if tl.sum(is_valid.to(tl.int32)) == 0:
        return
    first = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)  # the first half of the channels
    second = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in range(0, rank, BLOCK_R):
        factor = start + tl.arange(0, BLOCK_R)
        row = owner // kv_heads * capacity + position
        coefficient = tl.load(
            coefficients + row[:, None] * rank + factor[None, :],
            mask=is_valid[:, None] & (factor < rank)[None, :], other=0.0,
        )  # fmt: skip
        at_basis = basis + (owner * rank + factor)[:, None] * (2 * half) + channel[None, :]
        basis_mask = (factor < rank)[:, None] & (channel < half)[None, :]
        first_basis = tl.load(at_basis, mask=basis_mask, other=0.0)
        second_basis = tl.load(at_basis + half, mask=basis_mask, other=0.0)
        first = tl.dot(coefficient, first_basis, first, input_precision="ieee")
        second = tl.dot(coefficient, second_basis, second, input_precision="ieee")
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


@triton.jit(do_not_specialize=["capacity", "tokens"])
def _append_exact_kernel(  # type: ignore[no-untyped-def]
    k, v, row_stride, head_stride, exact, places, seq_lens, offsets, slots, kv_heads, capacity, tokens, head_dim,
    BLOCK_D: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Append the new token of one slot and KV head."""
    pdl_wait(USE_PDL)
    batch, kv = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    slot = tl.load(slots + batch).to(tl.int64)
    owner = slot * kv_heads + kv
    position = tl.minimum(tl.load(seq_lens + slot), tokens - 1)
    place = tl.minimum(tl.maximum(position - tl.load(offsets + slot), 0), capacity - 1)
    channel = tl.arange(0, BLOCK_D)
    source = batch * row_stride + kv * head_stride + channel
    target = exact + (owner * capacity + place) * 2 * head_dim + channel
    tl.store(target, tl.load(k + source, mask=channel < head_dim), mask=channel < head_dim)
    tl.store(target + head_dim, tl.load(v + source, mask=channel < head_dim), mask=channel < head_dim)
    tl.store(places + owner * tokens + position, place.to(tl.int32))
