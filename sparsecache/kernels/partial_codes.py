"""Partial keys as codes of 8 or 4 bits."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsecache.kernels._triton import next_power_of_2, tl, triton, use_kernel
from sparsecache.kernels.rows import index_slots

_TILE_BYTES = 4096  # bytes of codes that a program writes


class PartialCodes(NamedTuple):
    """The codes of the partial keys of all slots.

    codes: [slots, G, T, W] uint8. With 8 bits a byte holds a channel. With 4 bits byte i holds channel i in its low
    half and channel i + I / 2 in its high half. If I channels take an odd number of bytes, W is one more, since kernels
    read two bytes at once. step, center: [slots, G, I] float32. A code c stands for
    center + step * (c - (2^bits - 1) / 2).
    """

    codes: Tensor
    step: Tensor
    center: Tensor
    bits: int

    @property
    def channels(self) -> int:
        """Return the number of partial channels, I."""
        return self.step.shape[2]

    def set_range(self, slot: int, low: Tensor, high: Tensor) -> None:
        """Set the smallest and the largest value that a slot's codes can hold; low, high: [G, I]."""
        low, high = low.float(), high.float()
        torch.add(low, high, out=self.center[slot]).div_(2)
        # Multiplied, since a GPU rounds the division by a number otherwise than a CPU.
        step = torch.sub(high, low, out=self.step[slot]).mul_(1 / (2**self.bits - 1))
        # A channel of one value has a range of 0. Its codes are equal, so any positive step does.
        step.clamp_(min=torch.finfo(torch.float32).tiny)

    def store(self, slot: int, start: int, x: Tensor) -> None:
        """Store the codes of a slot's tokens from `start` on; x: [G, N, I], their partial keys."""
        if not use_kernel(x):
            self.codes[slot, :, start : start + x.shape[1]] = self.encode(slot, x)
            return
        x = x if x.stride(2) == 1 else x.contiguous()
        kv_heads, count, channels = x.shape
        _, _, capacity, width = self.codes.shape
        block_i = next_power_of_2(width)
        block_t = max(1, _TILE_BYTES // block_i)
        _store_kernel[(triton.cdiv(count, block_t), kv_heads)](
            x, x.stride(0), x.stride(1), self.codes[slot], self.step[slot], self.center[slot], start, count, capacity,
            channels, width, BITS=self.bits, BLOCK_T=block_t, BLOCK_I=block_i, num_warps=4,
        )  # fmt: skip

    def encode(self, slots: Tensor | int, x: Tensor) -> Tensor:
        """Return the bytes of x, the nearest codes, clamped to the range: [.., G, N, W] uint8.

        x: [.., G, N, I], partial keys of `slots`, which is one slot or [B].
        """
        steps = (x.float() - self.center[slots].unsqueeze(-2)).div_(self.step[slots].unsqueeze(-2))
        codes: Tensor = steps.add_(2 ** (self.bits - 1)).clamp_(0, 2**self.bits - 1).to(torch.uint8)  # rounds down
        if self.bits == 4:
            low, high = codes.chunk(2, -1)
            codes = low | (high << 4)
        return pad(codes, (0, codes.shape[-1] % 2))

    def decode(self, slots: Tensor, length: int) -> Tensor:
        """Return the values of the first tokens of slots [B] without their center: [B, G, length, I] float32."""
        codes = index_slots(self.codes[:, :, :length, : self.channels * self.bits // 8], slots)
        if self.bits == 4:
            codes = torch.cat((codes & 15, codes >> 4), -1)
        values: Tensor = (codes.float() - (2**self.bits - 1) / 2) * self.step[slots].unsqueeze(-2)
        return values


def make_partial_codes(size: tuple[int, int, int, int], bits: int, device: torch.device) -> PartialCodes:
    """Return codes of 0; size: slots, KV heads, tokens and channels; bits: 8, or 4 for an even number of channels."""
    slots, kv_heads, tokens, channels = size
    width = -(-channels * bits // 16) * 2
    codes = torch.zeros((slots, kv_heads, tokens, width), dtype=torch.uint8, device=device)
    step, center = torch.zeros((2, slots, kv_heads, channels), dtype=torch.float32, device=device)
    # A step may name a free slot, whose codes must not be divided by 0.
    return PartialCodes(codes, step.fill_(1.0), center, bits)


@triton.jit
def code_of(x, step, center, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes of x in float32 as int32, those of `PartialCodes.encode`."""
    steps = tl.div_rn(x - center, step)
    return tl.minimum(tl.maximum(steps + 2 ** (BITS - 1), 0.0), 2**BITS - 1).to(tl.int32)


@triton.jit(do_not_specialize=["start", "count", "capacity"])
def _store_kernel(  # type: ignore[no-untyped-def]
    x, head_stride, row_stride, codes, step, center, start, count, capacity, channels, width,
    BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Store the codes of BLOCK_T tokens of a KV head; codes, step and center: of one slot."""
    first, kv = tl.program_id(0) * BLOCK_T, tl.program_id(1).to(tl.int64)
    token, byte = (first + tl.arange(0, BLOCK_T)).to(tl.int64), tl.arange(0, BLOCK_I)
    part_channels = channels // (8 // BITS)
    inside = byte < part_channels
    mask = (token < count)[:, None] & inside[None, :]
    row = tl.zeros((BLOCK_T, BLOCK_I), dtype=tl.int32)
    for part in tl.static_range(8 // BITS):
        channel = part * part_channels + byte
        at_tokens = x + kv * head_stride + token[:, None] * row_stride + channel[None, :]
        value = tl.load(at_tokens, mask=mask, other=0.0).to(tl.float32)
        steps = tl.load(step + kv * channels + channel, mask=inside, other=1.0)
        middle = tl.load(center + kv * channels + channel, mask=inside, other=0.0)
        row |= code_of(value, steps[None, :], middle[None, :], BITS) << (part * BITS)
    target = codes + (kv * capacity + start + token)[:, None] * width + byte[None, :]
    tl.store(target, row.to(tl.uint8), mask=mask)
