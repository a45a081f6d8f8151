"""Evict the oldest token per KV head at a decode step, from a cache of unordered rows."""

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_options, pdl_wait, tl, triton, use_kernel
from sparsecache.kernels.eviction import KeptTokens, find_lowest, replace_rows

_MAX_BLOCK_T = 1024  # rows per iteration
_SINK_PRIORITY = 1 << 52  # above any position; less a position, it is exact in float64


def evict_oldest(tokens: KeptTokens, seq_lens: Tensor, slots: Tensor, budgets: Tensor, sinks: int) -> None:
    """Evict the oldest token of each KV head above its budget, but keep the first `sinks` tokens.

    If only sinks are left, the latest sink is evicted. tokens, seq_lens, slots, budgets: as in `evict_least_attended`.
    The scores of `tokens` do not change.
    """
    if use_kernel(seq_lens):
        kv_heads, capacity, head_dim = tokens.keys.shape[1:]
        _evict_oldest_kernel[(len(slots) * kv_heads,)](
            tokens.keys, tokens.values, tokens.positions, tokens.num_tokens, seq_lens, slots, budgets,
            kv_heads, capacity, head_dim, len(budgets) - 2, sinks,
            SINK_PRIORITY=_SINK_PRIORITY, BLOCK_T=min(_MAX_BLOCK_T, next_power_of_2(capacity, 16)),
            BLOCK_D=next_power_of_2(head_dim, 16), num_warps=4, **pdl_options(),
        )  # fmt: skip
        return
    past = seq_lens[slots].clamp(max=len(budgets) - 2)
    num_rows = tokens.begin_token(slots, past)
    positions = tokens.positions[slots].double()
    priorities = torch.where(positions < sinks, _SINK_PRIORITY - positions, positions)
    replace_rows(tokens, slots, find_lowest(tokens, slots, priorities, num_rows, budgets[past + 1]))


@triton.jit(do_not_specialize=["capacity", "last_position", "sinks"])
def _evict_oldest_kernel(  # type: ignore[no-untyped-def]
    keys, values, positions, num_tokens, seq_lens, slots, budgets, kv_heads, capacity, head_dim, last_position, sinks,
    SINK_PRIORITY: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Replace the oldest token of a KV head that is not a sink by the new token, which is in the row num_tokens."""
    pdl_wait(USE_PDL)
    slot = tl.load(slots + tl.program_id(0) // kv_heads).to(tl.int64)
    owner = slot * kv_heads + tl.program_id(0) % kv_heads
    new_row = tl.minimum(tl.load(num_tokens + owner), capacity - 1).to(tl.int32)
    past = tl.minimum(tl.load(seq_lens + slot), last_position)
    target, is_over = new_row, new_row + 1 > tl.load(budgets + past + 1)
    if is_over:
        # 1 << 62 is above any priority.
        lowest, lowest_row = tl.full((BLOCK_T,), 1 << 62, dtype=tl.int64), tl.zeros((BLOCK_T,), dtype=tl.int32)
        for first in tl.range(0, new_row + 1, BLOCK_T):
            row = first + tl.arange(0, BLOCK_T)
            position = tl.load(positions + owner * capacity + row, mask=row < new_row, other=0)
            position = tl.where(row == new_row, past, position)
            priority = tl.where(position < sinks, SINK_PRIORITY - position, position)
            is_lower = (priority < lowest) & (row <= new_row)
            lowest, lowest_row = tl.where(is_lower, priority, lowest), tl.where(is_lower, row, lowest_row)
        target = tl.max(tl.where(lowest == tl.min(lowest, axis=0), lowest_row, 0), axis=0)
        tl.debug_barrier()  # other threads must have read the position of this row
    tl.store(num_tokens + owner, tl.where(is_over, new_row, new_row + 1).to(tl.int64))
    tl.store(positions + owner * capacity + target, past)
    channel = tl.arange(0, BLOCK_D)
    source, destination = (
        (owner * capacity + new_row) * head_dim + channel,
        (owner * capacity + target) * head_dim + channel,
    )
    tl.store(keys + destination, tl.load(keys + source, mask=channel < head_dim), mask=channel < head_dim)
    tl.store(values + destination, tl.load(values + source, mask=channel < head_dim), mask=channel < head_dim)
