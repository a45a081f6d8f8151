"""Keys and values in 2, 4 or 8 bits, by the formula of KIVI (arXiv 2402.02750), in plain torch.

Keys are quantised per channel, in groups of consecutive tokens; values per token, in groups of consecutive channels. A
group's codes are the steps of size (maximum - minimum) / (2^bits - 1) above its minimum. The last tokens are in full
precision, in a ring. They leave it by whole groups, so that a group of keys is quantised once.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsecache.kernels.rows import take_rows

Bits = Literal[2, 4, 8]
_BLOCK = 8192  # prompt tokens that are quantised at a time


@dataclass(frozen=True)
class QuantisedStore:
    """Quantised keys and values of slots, and the ring of their last tokens.

    key_codes, value_codes: [S, G, N, W] int16, W words with the codes of D channels, N a multiple of `group`.
    key_ranges: [S, G, N / group, 2, D] and value_ranges: [S, G, N, 2, ceil(D / group)], minimum and step of each group.
    key_tail, value_tail: [S, G, residual + group, D], the tokens that are not quantised, by position modulo the size of
    the ring. capacity: maximum number of tokens of a slot. The first `num_quantised(n)` tokens of n are quantised.
    """

    key_codes: Tensor
    key_ranges: Tensor
    value_codes: Tensor
    value_ranges: Tensor
    key_tail: Tensor
    value_tail: Tensor
    bits: Bits
    group: int
    residual: int
    capacity: int

    @classmethod
    def allocate(
        cls,
        slots: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        bits: Bits,
        group: int,
        residual: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> "QuantisedStore":
        """Return an empty store. residual: minimum number of last tokens in full precision, a multiple of group."""
        rows = max(group, (capacity - residual) // group * group)

        def zeros(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros((slots, kv_heads, *size), dtype=dtype, device=device)

        words = -(-head_dim * bits // 16)
        return cls(
            key_codes=zeros(rows, words, dtype=torch.int16),
            key_ranges=zeros(rows // group, 2, head_dim),
            value_codes=zeros(rows, words, dtype=torch.int16),
            value_ranges=zeros(rows, 2, -(-head_dim // group)),
            key_tail=zeros(residual + group, head_dim),
            value_tail=zeros(residual + group, head_dim),
            bits=bits,
            group=group,
            residual=residual,
            capacity=capacity,
        )

    def num_quantised(self, lengths: Tensor) -> Tensor:
        """Return how many of the first tokens are quantised, for sequences of `lengths` tokens."""
        return (lengths - self.residual).clamp(min=0) // self.group * self.group

    def store_prompt(self, slot: int, k: Tensor, v: Tensor, counts: Tensor | None = None) -> None:
        """Store the first counts [G] tokens, by default all, of k and v [G, L, D] in a slot."""
        end = max(0, k.shape[1] - self.residual) // self.group * self.group
        for start in range(0, end, _BLOCK // self.group * self.group):
            block = slice(start, min(end, start + _BLOCK // self.group * self.group))
            self._quantise(slot, slice(None), block, k[:, block], v[:, block])
        self.store_tail(slot, k, v, counts)

    def store_tail(self, slot: int, k: Tensor, v: Tensor, counts: Tensor | None = None) -> None:
        """Store in the ring the last of the first counts [G] tokens, by default of all, of k and v [G, L, D]."""
        length, ring = k.shape[1], self.key_tail.shape[2]
        counts = torch.full((len(k),), length, device=k.device) if counts is None else counts
        token = counts[:, None] - ring + torch.arange(ring, device=k.device)  # the last positions; below 0: none
        source, target = token.clamp(min=0), token % ring
        for tail, x in ((self.key_tail[slot], k), (self.value_tail[slot], v)):
            index = source[..., None].expand(-1, -1, x.shape[2])
            tail.scatter_(1, target[..., None].expand_as(index), x.gather(1, index))

    def _quantise(self, slot: int, heads: slice, block: slice, k: Tensor, v: Tensor) -> None:
        """Quantise k and v [G, n, D] of KV heads, whole groups of tokens, into rows `block`."""
        groups = slice(block.start // self.group, block.stop // self.group)
        codes, ranges = quantise(k.reshape(len(k), -1, self.group, k.shape[2]), self.bits, 2)  # [G, groups, group, D]
        self.key_codes[slot, heads, block] = pack(codes.flatten(1, 2), self.bits)
        self.key_ranges[slot, heads, groups] = ranges.squeeze(3).movedim(0, 2)
        codes, ranges = quantise(_in_groups(v, self.group), self.bits, 3)  # [G, n, groups, group]
        self.value_codes[slot, heads, block] = pack(codes.flatten(2)[..., : v.shape[2]], self.bits)
        self.value_ranges[slot, heads, block] = ranges.squeeze(4).movedim(0, 2)

    def append(self, k: Tensor, v: Tensor, lengths: Tensor, slots: Tensor) -> None:
        """Append one token k, v [B, G, 1, D] to each slot. Quantise the oldest group of a full ring.

        lengths: as in `keys`. A full slot overwrites its last token. Waits for the device.
        """
        past = self.past(lengths, slots)
        full = past + 1 - self.num_quantised(past) == self.key_tail.shape[2]
        heads = torch.arange(k.shape[1], device=k.device)
        row = past % self.key_tail.shape[2]
        self.key_tail[slots[:, None], heads, row] = k[:, :, 0]
        self.value_tail[slots[:, None], heads, row] = v[:, :, 0]
        for b, g in full.nonzero().tolist():
            slot, start = int(slots[b]), int(self.num_quantised(past[b, g]))
            at = start % self.key_tail.shape[2]
            rows = slice(at, at + self.group)
            head = slice(g, g + 1)
            keys, values = self.key_tail[slot, head, rows], self.value_tail[slot, head, rows]
            self._quantise(slot, head, slice(start, start + self.group), keys, values)

    def past(self, lengths: Tensor, slots: Tensor) -> Tensor:
        """Return the past tokens of slots [B] per KV head: [B, G]. lengths: [S] or [S, G]."""
        past = lengths[slots].clamp(max=self.capacity - 1)
        return past if past.dim() == 2 else past[:, None].expand(-1, self.key_tail.shape[1])

    def keys(self, lengths: Tensor, slots: Tensor, rows: Tensor | int) -> Tensor:
        """Return the keys of tokens, dequantised where they are quantised: [B, G, N, D].

        lengths: number of tokens of each slot, int64, [S] or per KV head [S, G]; slots: [B] int64. rows: [B, G, N]
        int64, or an int N for the first N.
        """
        rows = self._rows(slots, rows)
        is_quantised = rows < self.num_quantised(self.past(lengths, slots))[..., None]
        index = rows * is_quantised
        codes = take_rows(self.key_codes, slots, index)
        minimum, step = take_rows(self.key_ranges, slots, index // self.group).unbind(3)
        return self._read(codes, minimum, step, self.key_tail, slots, rows, is_quantised)

    def values(self, lengths: Tensor, slots: Tensor, rows: Tensor | int) -> Tensor:
        """Return the values of tokens, as `keys` does."""
        rows = self._rows(slots, rows)
        is_quantised = rows < self.num_quantised(self.past(lengths, slots))[..., None]
        index = rows * is_quantised
        codes = take_rows(self.value_codes, slots, index)
        ranges = take_rows(self.value_ranges, slots, index)  # [B, G, N, 2, groups]
        head_dim = self.value_tail.shape[3]
        minimum, step = ranges.repeat_interleave(self.group, 4)[..., :head_dim].unbind(3)
        return self._read(codes, minimum, step, self.value_tail, slots, rows, is_quantised)

    def _rows(self, slots: Tensor, rows: Tensor | int) -> Tensor:
        if not isinstance(rows, int):
            return rows
        return torch.arange(rows, device=slots.device).expand(len(slots), self.key_tail.shape[1], -1)

    def _read(
        self, codes: Tensor, minimum: Tensor, step: Tensor, tail: Tensor, slots: Tensor, rows: Tensor, mask: Tensor
    ) -> Tensor:
        """Return dequantised rows where the mask is True, and those of the tail elsewhere."""
        numbers = unpack(codes, self.bits)[..., : tail.shape[3]].float()
        dequantised = (numbers * step.float() + minimum.float()).to(tail.dtype)
        return torch.where(mask[..., None], dequantised, take_rows(tail, slots, rows % tail.shape[2]))


def token_nbytes(head_dim: int, bits: int, group: int, dtype: torch.dtype) -> float:
    """Return the bytes of a quantised token's key and value in one KV head, with its share of minima and steps."""
    keys, values = 2 * head_dim / group, 2 * -(-head_dim // group)
    return 4 * -(-head_dim * bits // 16) + (keys + values) * dtype.itemsize


def quantise(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return the codes of x, uint8, and the minimum and step of each group [2, ..]; a group is a row along `dim`.

    The step is rounded to the dtype of x before codes are computed with it. Groups of equal numbers have step 0.
    """
    minimum, maximum = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    top = minimum.new_full((), 2**bits - 1, dtype=torch.float32)  # on a GPU, torch multiplies by 1 / a Python number
    step = ((maximum.float() - minimum.float()) / top).to(x.dtype)
    steps = (x.float() - minimum.float()) / torch.where(step == 0, 1, step.float())
    return steps.clamp(0, 2**bits - 1).round().to(torch.uint8), torch.stack((minimum, step))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes [.., D] in words [.., W], int16: code i * W + w is number i, from the lowest bits, of word w."""
    per_word = 16 // bits
    codes = pad(codes.to(torch.int16), (0, -codes.shape[-1] % per_word))
    codes = codes.view(*codes.shape[:-1], per_word, -1)
    shifts = torch.arange(0, 16, bits, device=codes.device, dtype=torch.int16)
    return (codes << shifts[:, None]).sum(-2, dtype=torch.int16)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return the codes in words [.., W], uint8: [.., 16 / bits * W]."""
    shifts = torch.arange(0, 16, bits, device=words.device, dtype=torch.int16)
    codes: Tensor = (words[..., None, :] >> shifts[:, None]) & (2**bits - 1)
    return codes.flatten(-2).to(torch.uint8)


def _in_groups(x: Tensor, group: int) -> Tensor:
    """Return x [.., D] as [.., ceil(D / group), group]; the last group is filled with the last channel."""
    channels = torch.arange(-(-x.shape[-1] // group) * group, device=x.device).clamp(max=x.shape[-1] - 1)
    return x[..., channels].view(*x.shape[:-1], -1, group)
