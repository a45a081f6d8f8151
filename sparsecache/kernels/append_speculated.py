"""Append a token's key, value and partial key, as in InfiniGen."""

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_options, pdl_wait, tl, triton, use_kernel
from sparsecache.kernels.partial_codes import PartialCodes, code_of
from sparsecache.kernels.rows import index_slots


def append_speculated(
    k: Tensor,
    v: Tensor,
    projection: Tensor | None,
    keys: Tensor | PartialCodes,
    store: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
) -> None:
    """Append one token's key, value and partial key to each slot.

    k, v: [B, G, 1, D]; projection, keys, seq_lens, slots: as in `speculation.speculated_scores`; store:
    [slots, G, T, 2, D], keys and values, on the device or in pinned host memory. `seq_lens` is not changed. A full slot
    overwrites its last row. Codes are those of `PartialCodes.encode`.
    """
    batch, kv_heads, _, head_dim = k.shape
    if use_kernel(k):
        rows, step, center, bits = keys if isinstance(keys, PartialCodes) else (keys, None, None, 16)
        channels = rows.shape[3] if step is None else step.shape[2]
        _append_speculated_kernel[(batch * kv_heads,)](
            k, v, k.stride(0), k.stride(1), projection, rows, step, center, store, seq_lens, slots,
            kv_heads, store.shape[2], head_dim, channels, rows.shape[3], BITS=bits, PROJECTED=projection is not None,
            BLOCK_D=next_power_of_2(head_dim), BLOCK_I=next_power_of_2(rows.shape[3]), num_warps=4, **pdl_options(),
        )  # fmt: skip
        return
    row = seq_lens[slots].clamp(max=store.shape[2] - 1)
    partial = k if projection is None else k.float() @ index_slots(projection, slots)
    if isinstance(keys, PartialCodes):
        keys.codes[slots, :, row] = keys.encode(slots, partial)[:, :, 0]
    else:
        keys[slots, :, row] = partial[:, :, 0].to(keys.dtype)
    slots, row = slots.to(store.device), row.to(store.device)
    store[slots, :, row] = torch.cat((k, v), 2).to(store.device)


@triton.jit(do_not_specialize=["capacity"])
def _append_speculated_kernel(  # type: ignore[no-untyped-def]
    k, v, k_row_stride, k_head_stride, projection, keys, step, center, store, seq_lens, slots, kv_heads, capacity,
    head_dim, channels, width,
    BITS: tl.constexpr, PROJECTED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Append the new token of one slot and KV head.

    BITS: 8 or 4 for codes, else 16. width: bytes of a token's codes; with 16 bits its channels.
    """
    pdl_wait(USE_PDL)
    row, kv = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    slot = tl.load(slots + row).to(tl.int64)
    owner = slot * kv_heads + kv
    place = owner * capacity + tl.minimum(tl.load(seq_lens + slot), capacity - 1)
    at, channel = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_I)
    k_ptr = k + row * k_row_stride + kv * k_head_stride
    key = tl.load(k_ptr + at, mask=at < head_dim, other=0.0)
    value = tl.load(v + row * k_row_stride + kv * k_head_stride + at, mask=at < head_dim, other=0.0)
    parts: tl.constexpr = 8 // BITS if BITS < 16 else 1  # channels per byte of codes
    part_channels = channels // parts
    row_of_keys = tl.zeros((BLOCK_I,), dtype=tl.int32 if BITS < 16 else tl.float32)
    for part in tl.static_range(parts):
        of_part, inside = part * part_channels + channel, channel < part_channels
        if PROJECTED:
            projection_block = tl.load(
                projection + (owner * head_dim + at[:, None]) * channels + of_part[None, :],
                mask=(at < head_dim)[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            partial = tl.sum(key.to(tl.float32)[:, None] * projection_block, axis=0)
        else:
            partial = tl.load(k_ptr + of_part, mask=inside, other=0.0).to(tl.float32)
        if BITS == 16:
            row_of_keys = partial
        else:
            at_range = owner * channels + of_part
            middle = tl.load(center + at_range, mask=inside, other=0.0)
            steps = tl.load(step + at_range, mask=inside, other=1.0)
            row_of_keys |= code_of(partial, steps, middle, BITS) << (part * BITS)
    tl.store(keys + place * width + channel, row_of_keys.to(keys.dtype.element_ty), mask=channel < part_channels)
    tl.store(store + place * 2 * head_dim + at, key, mask=at < head_dim)
    tl.store(store + (place * 2 + 1) * head_dim + at, value, mask=at < head_dim)
