"""Evict a token per KV head at a decode step, from a cache of unordered rows.

Two kernels evict by attention. The first one scores the rows of a split. The second one sums the probabilities of the
rows, and replaces the row of the lowest sum. `oldest` evicts by position. Evictions by other priorities are torch
operations.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecache.kernels._triton import (
    next_power_of_2,
    pdl_options,
    pdl_wait,
    saturating_programs,
    tl,
    triton,
    use_kernel,
)
from sparsecache.kernels.scores import scaled_scores
from sparsecache.kernels.threshold import split_range

_TILE_BYTES = 32768  # bytes of keys per iteration
_MIN_SPLIT = 128  # rows


class KeptTokens(NamedTuple):
    """The tokens that an eviction method keeps, in rows without an order.

    keys, values: [slots, G, rows, D]; positions: [slots, G, rows] int64; scores: [slots, G, rows] float32. num_tokens:
    [slots, G] int64, the first rows of each KV head are in use.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor
    num_tokens: Tensor

    def begin_token(self, slots: Tensor, past: Tensor) -> Tensor:
        """Initialise the state of the new token, at position past [B]; return the rows in use with it, [B, G].

        The new token is in row num_tokens, or in the last one if all are in use. Its score begins at 0.
        """
        num_rows = self.num_tokens[slots]
        new_row = num_rows.clamp(max=self.keys.shape[2] - 1)
        index = slots[:, None], torch.arange(num_rows.shape[1], device=num_rows.device), new_row
        self.positions[index] = past[:, None].expand_as(num_rows)
        # Assigning a number would copy it from the host.
        self.scores[index] = torch.zeros_like(num_rows, dtype=torch.float32)
        return new_row + 1

    def attention(self, q: Tensor, slots: Tensor) -> Tensor:
        """Return the attention of q [B, H, 1, D] to each row, summed over a KV head's queries: [B, G, rows] float32.

        The rows include the new token.
        """
        keys = self.keys[slots]
        is_free = torch.arange(keys.shape[2], device=q.device) > self.num_tokens[slots][..., None]
        scores = scaled_scores(q, keys, keys.shape[3]).view(*keys.shape[:2], -1, keys.shape[2])  # [B, G, H / G, rows]
        return scores.masked_fill(is_free[:, :, None], -torch.inf).softmax(-1).sum(2)


class Eviction(NamedTuple):
    """Which rows a step evicts: row [B, G] where over [B, G] is True; the last row in use, last [B, G], replaces it.

    Where over is False, row is last.
    """

    row: Tensor
    last: Tensor
    over: Tensor


def find_lowest(tokens: KeptTokens, slots: Tensor, priorities: Tensor, num_rows: Tensor, budget: Tensor) -> Eviction:
    """Find the row of lowest priority of each KV head that has more than budget [B] rows; ties go to the earliest.

    priorities: [B, G, rows]; num_rows: [B, G], the rows in use.
    """
    positions = tokens.positions[slots]
    is_free = torch.arange(priorities.shape[2], device=num_rows.device) >= num_rows[..., None]
    priorities = priorities.masked_fill(is_free, torch.inf)
    is_lowest = priorities == priorities.amin(2, keepdim=True)
    lowest = positions.masked_fill(~is_lowest, torch.iinfo(torch.int64).max).argmin(2)
    over, last = num_rows > budget[:, None], num_rows - 1
    return Eviction(torch.where(over, lowest, last), last, over)


def replace_rows(tokens: KeptTokens, slots: Tensor, eviction: Eviction, more: tuple[Tensor, ...] = ()) -> None:
    """Replace the evicted rows, and set the number of tokens. more: further tensors with a row per token."""
    row, last, over = eviction
    heads = torch.arange(row.shape[1], device=row.device)
    destination, source = (slots[:, None], heads, row), (slots[:, None], heads, last)
    for rows in (*tokens[:4], *more):
        rows[destination] = rows[source]
    tokens.num_tokens[slots] = torch.where(over, last, last + 1)


def evict_least_attended(
    q: Tensor,
    tokens: KeptTokens,
    seq_lens: Tensor,
    slots: Tensor,
    budgets: Tensor,
    recent: Tensor,
    *,
    accumulate: bool,
    shared: bool,
) -> None:
    """Score the tokens by the attention of a step, and evict the lowest one of each KV head above its budget.

    The new token's key and value are in the row num_tokens; the rest of its state begins here. The last tokens are
    never evicted. Of tokens with equal scores the earliest is evicted.

    q: [B, H, 1, D]; seq_lens: [slots] int64, past tokens; slots: [B] int64. budgets, recent: [max_tokens + 1] int64,
    how many tokens to keep, and how many of the last are never evicted, by tokens. accumulate: add the attention to the
    scores. shared: whether it is summed over all KV heads, which must hold the same tokens in the same rows.
    """
    if use_kernel(q):
        _launch(q, tokens, seq_lens, slots, budgets, recent, accumulate, shared)
        return
    past = seq_lens[slots].clamp(max=len(budgets) - 2)
    num_rows = tokens.begin_token(slots, past)
    scores = tokens.attention(q, slots)
    if shared:
        scores = scores.sum(1, keepdim=True).expand_as(scores)
    if accumulate:
        scores = tokens.scores[slots] + scores
    tokens.scores[slots] = scores
    is_recent = tokens.positions[slots] >= (past + 1 - recent[past + 1])[:, None, None]
    priorities = scores.masked_fill(is_recent, torch.inf)
    replace_rows(tokens, slots, find_lowest(tokens, slots, priorities, num_rows, budgets[past + 1]))


def _launch(
    q: Tensor,
    tokens: KeptTokens,
    seq_lens: Tensor,
    slots: Tensor,
    budgets: Tensor,
    recent: Tensor,
    accumulate: bool,
    shared: bool,
) -> None:
    batch, heads, _, head_dim = q.shape
    kv_heads, capacity = tokens.keys.shape[1:3]
    group, device = heads // kv_heads, q.device
    grid = batch * kv_heads
    splits = max(1, min(64, saturating_programs(device) // grid, capacity // _MIN_SPLIT))
    logits = torch.empty((batch, heads, capacity), device=device, dtype=torch.float32)
    statistics = torch.empty((2, batch, heads, splits), device=device, dtype=torch.float32)  # maxima, sums
    block_d = next_power_of_2(head_dim, 16)
    block_t = max(16, min(128, _TILE_BYTES // (block_d * q.element_size())))
    _row_scores_kernel[(grid, splits)](
        q, q.stride(0), q.stride(1), tokens.keys, tokens.num_tokens, slots, logits, statistics,
        1 / math.sqrt(head_dim), kv_heads, capacity, head_dim, statistics[0].numel(),
        GROUP=group, BLOCK_Q=next_power_of_2(group, 16), BLOCK_T=block_t, BLOCK_D=block_d, SPLITS=splits,
        num_warps=4, **pdl_options(),
    )  # fmt: skip
    summed = heads if shared else group
    block_h = next_power_of_2(summed)
    _evict_kernel[(grid,)](
        *tokens, seq_lens, slots, budgets, recent, logits, statistics,
        kv_heads, capacity, head_dim, len(budgets) - 2, statistics[0].numel(),
        ACCUMULATE=accumulate, SHARED=shared, GROUP=group, SUMMED=summed, BLOCK_H=block_h,
        BLOCK_T=max(16, min(1024, 4096 // block_h)), BLOCK_D=block_d, SPLITS=splits, BLOCK_S=next_power_of_2(splits),
        num_warps=4, **pdl_options(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["capacity", "statistics_size"])
def _row_scores_kernel(  # type: ignore[no-untyped-def]
    q, q_row_stride, q_head_stride, keys, num_tokens, slots, logits, statistics, scale, kv_heads, capacity, head_dim,
    statistics_size,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """Score the rows of a split for the query heads of a KV head; find each head's maximum and sum of exponentials."""
    pdl_wait(USE_PDL)
    row, kv, split = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads, tl.program_id(1)
    owner = tl.load(slots + row).to(tl.int64) * kv_heads + kv
    num_rows = tl.minimum(tl.load(num_tokens + owner), capacity - 1).to(tl.int32) + 1
    query, channel = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    in_head = channel < head_dim
    q_ptr = q + row * q_row_stride + (kv * GROUP + query)[:, None] * q_head_stride + channel[None, :]
    q_block = tl.load(q_ptr, mask=(query < GROUP)[:, None] & in_head[None, :], other=0.0)
    maximum = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    head = (tl.program_id(0) * GROUP + query).to(tl.int64)
    start, end = split_range(num_rows, split, BLOCK_T, SPLITS)
    for first in tl.range(start, end, BLOCK_T):
        at = first + tl.arange(0, BLOCK_T)
        key_ptr = keys + (owner * capacity + at)[:, None] * head_dim + channel[None, :]
        key = tl.load(key_ptr, mask=(at < end)[:, None] & in_head[None, :], other=0.0)
        score = tl.dot(q_block, tl.trans(key), input_precision="ieee") * scale
        score = tl.where((at < end)[None, :], score, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(score, axis=1))
        total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(score - new_maximum[:, None]), axis=1)
        maximum = new_maximum
        target = logits + head[:, None] * capacity + at[None, :]
        tl.store(target, score, mask=(query < GROUP)[:, None] & (at < end)[None, :])
    tl.store(statistics + head * SPLITS + split, maximum, mask=query < GROUP)
    tl.store(statistics + statistics_size + head * SPLITS + split, total, mask=query < GROUP)


@triton.jit
def keep_lower(priority, position, row, is_used, lowest, earliest, lowest_row):  # type: ignore[no-untyped-def]
    """Return the lower priority per lane, with its position and row; of equal ones that of the earlier position."""
    is_lower = ((priority < lowest) | ((priority == lowest) & (position < earliest))) & is_used
    lowest, earliest = tl.where(is_lower, priority, lowest), tl.where(is_lower, position, earliest)
    return lowest, earliest, tl.where(is_lower, row, lowest_row)


@triton.jit
def first_lowest(lowest, earliest, lowest_row):  # type: ignore[no-untyped-def]
    """Return the row of the lowest priority of all lanes, and of equal ones that of the earliest position."""
    earliest = tl.where(lowest == tl.min(lowest, axis=0), earliest, 1 << 62)  # above any position
    return tl.max(tl.where(earliest == tl.min(earliest, axis=0), lowest_row, 0), axis=0)


@triton.jit(do_not_specialize=["capacity", "last_position", "statistics_size"])
def _evict_kernel(  # type: ignore[no-untyped-def]
    keys, values, positions, scores, num_tokens, seq_lens, slots, budgets, recent, logits, statistics,
    kv_heads, capacity, head_dim, last_position, statistics_size,
    ACCUMULATE: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr, SUMMED: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Sum the probabilities of the rows of a KV head, and replace the row of the lowest score by the new token."""
    pdl_wait(USE_PDL)
    row, kv = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    slot = tl.load(slots + row).to(tl.int64)
    owner = slot * kv_heads + kv
    new_row = tl.minimum(tl.load(num_tokens + owner), capacity - 1).to(tl.int32)
    past = tl.minimum(tl.load(seq_lens + slot), last_position)
    budget, first_recent = tl.load(budgets + past + 1), past + 1 - tl.load(recent + past + 1)

    head, split = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_S)
    first_head = row * kv_heads * GROUP if SHARED else tl.program_id(0) * GROUP
    source = statistics + (first_head + head)[:, None] * SPLITS + split[None, :]
    in_splits = (head < SUMMED)[:, None] & (split < SPLITS)[None, :]
    maxima = tl.load(source, mask=in_splits, other=float("-inf"))
    maximum = tl.where(head < SUMMED, tl.max(maxima, axis=1), 0.0)
    sums = tl.load(source + statistics_size, mask=in_splits, other=0.0)
    total = tl.sum(sums * tl.exp(maxima - maximum[:, None]), axis=1)
    weight = tl.where(head < SUMMED, 1 / tl.where(head < SUMMED, total, 1.0), 0.0)

    lowest = tl.full((BLOCK_T,), float("inf"), dtype=tl.float32)
    earliest = tl.full((BLOCK_T,), 1 << 62, dtype=tl.int64)  # position of the lowest
    lowest_row, new_score = tl.zeros((BLOCK_T,), dtype=tl.int32), tl.zeros((BLOCK_T,), dtype=tl.float32)
    for first in tl.range(0, new_row + 1, BLOCK_T):
        at = first + tl.arange(0, BLOCK_T)
        is_used, is_new = at <= new_row, at == new_row
        logit_ptr = logits + (first_head + head).to(tl.int64)[:, None] * capacity + at[None, :]
        logit = tl.load(logit_ptr, mask=(head < SUMMED)[:, None] & is_used[None, :], other=0.0)
        score = tl.sum(tl.exp(logit - maximum[:, None]) * weight[:, None], axis=0)
        if ACCUMULATE:
            score += tl.load(scores + owner * capacity + at, mask=at < new_row, other=0.0)
        tl.store(scores + owner * capacity + at, score, mask=is_used)
        new_score += tl.where(is_new, score, 0.0)
        position = tl.load(positions + owner * capacity + at, mask=at < new_row, other=0)
        position = tl.where(is_new, past, position)
        priority = tl.where(position >= first_recent, float("inf"), score)
        lowest, earliest, lowest_row = keep_lower(priority, position, at, is_used, lowest, earliest, lowest_row)
    chosen = first_lowest(lowest, earliest, lowest_row)
    is_over = new_row + 1 > budget
    target = tl.where(is_over, chosen, new_row)
    tl.debug_barrier()  # another thread stored the score of this row
    tl.store(scores + owner * capacity + target, tl.sum(new_score, axis=0))
    tl.store(positions + owner * capacity + target, past)
    tl.store(num_tokens + owner, tl.where(is_over, new_row, new_row + 1).to(tl.int64))
    channel = tl.arange(0, BLOCK_D)
    source = (owner * capacity + new_row) * head_dim + channel
    destination = (owner * capacity + target) * head_dim + channel
    tl.store(keys + destination, tl.load(keys + source, mask=channel < head_dim), mask=channel < head_dim)
    tl.store(values + destination, tl.load(values + source, mask=channel < head_dim), mask=channel < head_dim)
