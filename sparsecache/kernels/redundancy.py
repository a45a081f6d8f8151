"""Evict a token per KV head at a decode step by importance and redundancy, as in R-KV.

The first kernel compares the rows of a split with the new key and with the last queries. The second one adds the
similarities with the new token to the sums, and finds the row of lowest score. The third one subtracts the similarities
with this row from the sums, and moves the new token there.

A token's redundancy follows from the sum of its similarities with the other tokens. Each token exempts the latest token
similar to it: their similarity does not count in the sum of that token.

In one file because the kernels and their reference change the same state in the same order.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparsecache.kernels._triton import (
    next_power_of_2,
    pdl_options,
    pdl_wait,
    saturating_programs,
    tl,
    triton,
    use_kernel,
)
from sparsecache.kernels.eviction import (
    Eviction,
    KeptTokens,
    find_lowest,
    first_lowest,
    keep_lower,
    replace_rows,
)
from sparsecache.kernels.scores import scaled_scores
from sparsecache.kernels.threshold import split_range

_KEPT = 2.0  # priority of recent tokens, above any score
_MIN_SPLIT, _BLOCK_T = 128, 64  # rows
_BLOCK = 2048  # rows times queries per iteration


class Redundancy(NamedTuple):
    """What R-KV stores in addition to the tokens. The tokens' scores are their sums of similarities.

    exempted: [slots, G, rows] int64, the row of the token that a token exempts, -1 for none. similarity: [slots, G,
    rows] float32, the similarity with that token. queries: [slots, G, H / G, window, D], the last ones, by position %
    window. threshold: tokens with a higher cosine similarity are similar. weight: of importance; redundancy has
    1 - weight.
    """

    exempted: Tensor
    similarity: Tensor
    queries: Tensor
    threshold: float
    weight: float


def evict_redundant(
    q: Tensor, tokens: KeptTokens, state: Redundancy, seq_lens: Tensor, slots: Tensor, budgets: Tensor
) -> None:
    """Add the new token to the sums, and evict the token of lowest score of each KV head above its budget.

    The new token's key and value are in the row num_tokens. q: [B, H, 1, D], its queries; seq_lens: [slots] int64, past
    tokens; slots: [B] int64; budgets: [max_tokens + 1] int64, how many tokens to keep, by tokens.
    """
    if use_kernel(q):
        _launch(q, tokens, state, seq_lens, slots, budgets)
        return
    window = state.queries.shape[3]
    state.queries[slots, :, :, seq_lens[slots] % window] = q.view(len(slots), tokens.keys.shape[1], -1, q.shape[3])
    past = seq_lens[slots].clamp(max=len(budgets) - 2)
    num_rows = tokens.begin_token(slots, past)
    unit, new = normalize(tokens.keys[slots].float(), dim=3), num_rows[..., None] - 1
    sums = _add(unit, tokens, state, slots, new)
    tokens.scores[slots] = sums
    priorities = _priorities(tokens, state, slots, sums, new, past + 1)
    eviction = find_lowest(tokens, slots, priorities, num_rows, budgets[past + 1])
    _remove(unit, tokens, state, slots, eviction)
    replace_rows(tokens, slots, eviction, (state.exempted, state.similarity))


def _add(unit: Tensor, tokens: KeptTokens, state: Redundancy, slots: Tensor, new: Tensor) -> Tensor:
    """Add the new token's similarities; return the sums [B, G, rows]. unit: [B, G, rows, D]; new: [B, G, 1]."""
    exempted, similarity, rows = state.exempted[slots], state.similarity[slots], _rows(unit)
    found = _similarities(unit, new).masked_fill(rows >= new, 0)
    is_similar = found > state.threshold
    # Tokens similar to the new one exempt it from now on, so the similarities that they exempted before count again.
    restored = similarity.masked_fill(~is_similar | (exempted < 0), 0)
    sums = tokens.scores[slots].scatter_add(2, exempted.clamp(min=0), restored)
    latest, row = tokens.positions[slots].masked_fill(~is_similar, -1).max(2, keepdim=True)
    exempted_cosine = found.gather(2, row).masked_fill(latest < 0, 0)
    sums = (sums + found).scatter_add(2, row, -exempted_cosine)
    sums.scatter_(2, new, found.masked_fill(is_similar, 0).sum(2, keepdim=True))
    state.exempted[slots] = torch.where(is_similar, new, exempted).scatter(2, new, row.masked_fill(latest < 0, -1))
    state.similarity[slots] = torch.where(is_similar, found, similarity).scatter(2, new, exempted_cosine)
    return sums


def _priorities(
    tokens: KeptTokens, state: Redundancy, slots: Tensor, sums: Tensor, new: Tensor, past: Tensor
) -> Tensor:
    """Return the scores of the rows, [B, G, rows] float64; the last `window` tokens are above all others."""
    keys, positions, window = tokens.keys[slots], tokens.positions[slots], state.queries.shape[3]
    is_free, is_recent = _rows(keys) > new, positions >= (past - window)[:, None, None]
    logits = scaled_scores(state.queries[slots].flatten(2, 3), keys, keys.shape[3])
    logits = logits.view(*keys.shape[:2], -1, window, keys.shape[2]).amax(2)  # [B, G, window, rows]
    votes = logits.masked_fill((is_free | is_recent)[:, :, None], torch.finfo(torch.float32).min).softmax(-1)
    redundancy = (sums / (new + 1)).masked_fill(is_free, -torch.inf).softmax(-1)
    scores = state.weight * votes.mean(2) - (1 - state.weight) * redundancy
    return torch.where(is_recent, _KEPT + positions, scores.double())


def _remove(unit: Tensor, tokens: KeptTokens, state: Redundancy, slots: Tensor, eviction: Eviction) -> None:
    """Subtract the similarities with the evicted rows from the sums, before the last row replaces them."""
    row, last, over = (part[..., None] for part in eviction)
    exempted, sums, rows = state.exempted[slots], tokens.scores[slots], _rows(unit)
    found = _similarities(unit, row).masked_fill(~over | (rows > last) | (rows == row), 0)
    row_exempted = exempted.gather(2, row)
    exempted_by_row = found.gather(2, row_exempted.clamp(min=0)).masked_fill(row_exempted < 0, 0)
    tokens.scores[slots] = (sums - found).scatter_add(2, row_exempted.clamp(min=0), exempted_by_row)
    exempted = exempted.masked_fill((exempted == row) & over, -1)
    state.exempted[slots] = torch.where((exempted == last) & over, row, exempted)


def _rows(x: Tensor) -> Tensor:
    return torch.arange(x.shape[2], device=x.device)


def _similarities(unit: Tensor, row: Tensor) -> Tensor:
    """Return the cosine similarities of a row [B, G, 1] with all rows of unit keys [B, G, rows, D]: [B, G, rows]."""
    index = row[..., None].expand(*row.shape, unit.shape[3])
    similarities: Tensor = (unit @ unit.gather(2, index).mT)[..., 0]
    return similarities


def _launch(q: Tensor, tokens: KeptTokens, state: Redundancy, seq_lens: Tensor, slots: Tensor, budgets: Tensor) -> None:
    batch, _, _, head_dim = q.shape
    kv_heads, capacity = tokens.keys.shape[1:3]
    group, window = state.queries.shape[2:4]
    owners, device = batch * kv_heads, q.device
    splits = max(1, min(64, saturating_programs(device) // owners, capacity // _MIN_SPLIT))

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((*size,), device=device, dtype=dtype)

    found, logits = empty(owners, capacity), empty(owners, window, capacity)
    statistics = empty(2, owners, window, splits)  # maxima, sums
    evicted, evicted_key = empty(owners, 3, dtype=torch.int32), empty(owners, head_dim)
    block_g = next_power_of_2(group)
    block_w = next_power_of_2(window, -(-16 // block_g))
    sizes: dict[str, Any] = {"BLOCK_D": next_power_of_2(head_dim, 16), "SPLITS": splits, **pdl_options()}
    _compare_kernel[(owners, splits)](
        q, q.stride(0), q.stride(1), state.queries, tokens.keys, tokens.positions, tokens.num_tokens, seq_lens, slots,
        found, logits, statistics, 1 / math.sqrt(head_dim), kv_heads, capacity, head_dim, len(budgets) - 2,
        GROUP=group, BLOCK_G=block_g, WINDOW=window, BLOCK_W=block_w, BLOCK_T=_BLOCK_T, num_warps=4, **sizes,
    )  # fmt: skip
    _score_kernel[(owners,)](
        *tokens, state.exempted, state.similarity, seq_lens, slots, budgets, found, logits, statistics, evicted,
        evicted_key, state.threshold, state.weight, kv_heads, capacity, head_dim, len(budgets) - 2,
        WINDOW=window, BLOCK_W=block_w, BLOCK_R=max(32, _BLOCK // block_w), BLOCK_S=next_power_of_2(splits),
        num_warps=4, **sizes,
    )  # fmt: skip
    _remove_kernel[(owners, splits)](
        *tokens[:4], state.exempted, state.similarity, slots, evicted, evicted_key, kv_heads, capacity, head_dim,
        BLOCK_T=_BLOCK_T, num_warps=4, **sizes,
    )  # fmt: skip


@triton.jit
def _inverse_norm(x):  # type: ignore[no-untyped-def]
    """Return 1 / |x| of rows x [N, D]: [N]."""
    return 1 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)  # as torch's normalize


@triton.jit(do_not_specialize=["capacity", "last_position"])
def _compare_kernel(  # type: ignore[no-untyped-def]
    q, q_row_stride, q_head_stride, queries, keys, positions, num_tokens, seq_lens, slots, found, logits, statistics,
    scale, kv_heads, capacity, head_dim, last_position,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, WINDOW: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Compare the rows of a split with the new key and the last queries, and store the new query."""
    pdl_wait(USE_PDL)
    pair, row, kv, split = tl.program_id(0), tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads, tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    owner = slot * kv_heads + kv
    past = tl.load(seq_lens + slot)
    newest = past % WINDOW
    first_recent = tl.minimum(past, last_position) + 1 - WINDOW
    new_row = tl.minimum(tl.load(num_tokens + owner), capacity - 1).to(tl.int32)
    channel, at = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_G * BLOCK_W)
    in_head = (channel < head_dim)[None, :]
    group, place = at // BLOCK_W, at % BLOCK_W
    is_query = (group < GROUP) & (place < WINDOW)
    kept_ptr = queries + ((owner * GROUP + group) * WINDOW + place)[:, None] * head_dim + channel[None, :]
    new_ptr = q + row * q_row_stride + (kv * GROUP + group)[:, None] * q_head_stride + channel[None, :]
    is_newest = (is_query & (place == newest))[:, None] & in_head
    new_query = tl.load(new_ptr, mask=is_newest, other=0.0)
    query = tl.load(kept_ptr, mask=is_query[:, None] & in_head & ~is_newest, other=0.0) + new_query
    if split == 0:
        tl.store(kept_ptr, new_query, mask=is_newest)
    base = keys + owner * capacity * head_dim + channel[None, :]
    new_key = tl.load(base + new_row * head_dim, mask=in_head, other=0.0).to(tl.float32)
    new_key *= _inverse_norm(new_key)[:, None]

    # Maxima begin at -3e38, not at -inf, whose difference from itself is NaN.
    maximum, total = tl.full((BLOCK_W,), -3e38, tl.float32), tl.zeros((BLOCK_W,), dtype=tl.float32)
    window = tl.arange(0, BLOCK_W)
    start, end = split_range(new_row + 1, split, BLOCK_T, SPLITS)
    for first in tl.range(start, end, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T)
        key = tl.load(base + rows[:, None] * head_dim, mask=(rows < end)[:, None] & in_head, other=0.0)
        exact = key.to(tl.float32)
        cosine = tl.sum(exact * new_key, axis=1) * _inverse_norm(exact)
        tl.store(found + pair.to(tl.int64) * capacity + rows, cosine, mask=rows < end)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(is_query[:, None], score, float("-inf"))
        score = tl.max(tl.reshape(score, (BLOCK_G, BLOCK_W, BLOCK_T)), axis=0)
        position = tl.load(positions + owner * capacity + rows, mask=rows < end, other=0)
        is_candidate = ((rows < new_row) & (position < first_recent))[None, :]
        new_maximum = tl.maximum(maximum, tl.max(tl.where(is_candidate, score, -3e38), axis=1))
        weight = tl.where(is_candidate, tl.exp(score - new_maximum[:, None]), 0.0)
        total = total * tl.exp(maximum - new_maximum) + tl.sum(weight, axis=1)
        maximum = new_maximum
        target = logits + (pair.to(tl.int64) * WINDOW + window)[:, None] * capacity + rows[None, :]
        tl.store(target, score, mask=(window < WINDOW)[:, None] & (rows < end)[None, :])
    target = statistics + (pair * WINDOW + window) * SPLITS + split
    tl.store(target, maximum, mask=window < WINDOW)
    tl.store(target + tl.num_programs(0) * WINDOW * SPLITS, total, mask=window < WINDOW)


@triton.jit(do_not_specialize=["capacity", "last_position"])
def _score_kernel(  # type: ignore[no-untyped-def]
    keys, values, positions, scores, num_tokens, exempted, similarity, seq_lens, slots, budgets, found, logits,
    statistics, evicted, evicted_key, threshold, weight, kv_heads, capacity, head_dim, last_position,
    WINDOW: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Add the new token of a KV head to the sums of similarities, and find the row of lowest score.

    evicted: [3] per KV head, that row or -1 if nothing is evicted, the new token's row, and the row that the evicted
    token exempts. evicted_key: the evicted token's key, scaled to length 1.
    """
    pdl_wait(USE_PDL)
    pair = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + tl.program_id(0) // kv_heads).to(tl.int64)
    owner = slot * kv_heads + tl.program_id(0) % kv_heads
    base = owner * capacity
    new_row = tl.minimum(tl.load(num_tokens + owner), capacity - 1).to(tl.int32)
    past = tl.minimum(tl.load(seq_lens + slot), last_position)
    budget, first_recent = tl.load(budgets + past + 1), past + 1 - WINDOW
    at = tl.arange(0, BLOCK_R)

    latest, latest_cosine = tl.full((BLOCK_R,), -1, tl.int64), tl.zeros((BLOCK_R,), dtype=tl.float32)
    latest_row, dissimilar = tl.full((BLOCK_R,), -1, tl.int32), tl.zeros((BLOCK_R,), dtype=tl.float32)
    for first in tl.range(0, new_row, BLOCK_R):
        row = first + at
        cosine = tl.load(found + pair * capacity + row, mask=row < new_row, other=0.0)
        is_similar = (cosine > threshold) & (row < new_row)
        exempted_row = tl.load(exempted + base + row, mask=is_similar, other=-1)
        restored = tl.load(similarity + base + row, mask=is_similar, other=0.0)
        tl.atomic_add(scores + base + exempted_row, restored, mask=is_similar & (exempted_row >= 0), sem="relaxed")
        position = tl.load(positions + base + row, mask=is_similar, other=-1)
        is_later = position > latest
        latest, latest_cosine = tl.where(is_later, position, latest), tl.where(is_later, cosine, latest_cosine)
        latest_row = tl.where(is_later, row, latest_row)
        dissimilar += tl.where(is_similar, 0.0, cosine)
    is_latest = (latest == tl.max(latest, axis=0)) & (latest_row >= 0)
    new_exempted_row = tl.max(tl.where(is_latest, latest_row, -1), axis=0)
    exempted_cosine = tl.sum(tl.where(is_latest, latest_cosine, 0.0), axis=0)
    new_sum = tl.sum(dissimilar, axis=0)
    tl.debug_barrier()  # the sums of other threads are complete

    number = (new_row + 1).to(tl.float32)
    highest, total = tl.full((BLOCK_R,), -3e38, tl.float32), tl.zeros((BLOCK_R,), dtype=tl.float32)
    for first in tl.range(0, new_row + 1, BLOCK_R):
        row = first + at
        is_new, is_used = row == new_row, row <= new_row
        cosine = tl.load(found + pair * capacity + row, mask=row < new_row, other=0.0)
        sums = tl.load(scores + base + row, mask=row < new_row, other=0.0, cache_modifier=".cg")
        sums = tl.where(is_new, new_sum, sums + cosine - tl.where(row == new_exempted_row, exempted_cosine, 0.0))
        is_similar = (cosine > threshold) & (row < new_row)
        tl.store(scores + base + row, sums, mask=is_used)
        tl.store(
            exempted + base + row, tl.where(is_new, new_exempted_row, new_row).to(tl.int64), mask=is_similar | is_new
        )
        tl.store(similarity + base + row, tl.where(is_new, exempted_cosine, cosine), mask=is_similar | is_new)
        mean = tl.where(is_used, sums / number, -3e38)
        new_highest = tl.maximum(highest, mean)
        total = total * tl.exp(highest - new_highest) + tl.where(is_used, tl.exp(mean - new_highest), 0.0)
        highest = new_highest
    redundancy_highest = tl.max(highest, axis=0)
    redundancy_total = tl.sum(total * tl.exp(highest - redundancy_highest), axis=0)
    tl.debug_barrier()

    window, split = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_S)
    source = statistics + (pair * WINDOW + window)[:, None] * SPLITS + split[None, :]
    in_splits = (window < WINDOW)[:, None] & (split < SPLITS)[None, :]
    maxima = tl.load(source, mask=in_splits, other=-3e38)
    maximum = tl.max(maxima, axis=1)
    vote_sums = tl.load(source + tl.num_programs(0) * WINDOW * SPLITS, mask=in_splits, other=0.0)
    vote_total = tl.sum(vote_sums * tl.exp(maxima - maximum[:, None]), axis=1)
    vote_weight = tl.where(vote_total > 0, 1 / tl.where(vote_total > 0, vote_total, 1.0), 0.0) / WINDOW
    lowest, earliest = tl.full((BLOCK_R,), float("inf"), tl.float32), tl.full((BLOCK_R,), 1 << 62, tl.int64)
    lowest_row = tl.zeros((BLOCK_R,), dtype=tl.int32)
    for first in tl.range(0, new_row + 1, BLOCK_R):
        row = first + at
        is_used = row <= new_row
        position = tl.load(positions + base + row, mask=row < new_row, other=0)
        position = tl.where(row == new_row, past, position)
        is_recent = position >= first_recent
        mask = (window < WINDOW)[:, None] & (is_used & (position < first_recent))[None, :]
        logit = tl.load(logits + (pair * WINDOW + window)[:, None] * capacity + row[None, :], mask=mask, other=-3e38)
        votes = tl.sum(tl.where(mask, tl.exp(logit - maximum[:, None]) * vote_weight[:, None], 0.0), axis=0)
        mean = tl.load(scores + base + row, mask=is_used, other=0.0, cache_modifier=".cg") / number
        share = tl.exp(mean - redundancy_highest) / redundancy_total
        score = weight * votes - (1 - weight) * share
        priority = tl.where(is_recent, 2.0 + position.to(tl.float32), score)
        lowest, earliest, lowest_row = keep_lower(priority, position, row, is_used, lowest, earliest, lowest_row)
    chosen = first_lowest(lowest, earliest, lowest_row)
    is_over = new_row + 1 > budget
    tl.store(positions + base + new_row, past)
    tl.store(num_tokens + owner, tl.where(is_over, new_row, new_row + 1).to(tl.int64))
    tl.store(evicted + pair * 3, tl.where(is_over, chosen, -1))
    tl.store(evicted + pair * 3 + 1, new_row)
    tl.store(evicted + pair * 3 + 2, tl.load(exempted + base + chosen, cache_modifier=".cg").to(tl.int32))
    channel = tl.arange(0, BLOCK_D)[None, :]
    key_ptr = keys + (base + chosen) * head_dim + channel
    key = tl.load(key_ptr, mask=channel < head_dim, other=0.0).to(tl.float32)
    tl.store(evicted_key + pair * head_dim + channel, key * _inverse_norm(key)[:, None], mask=channel < head_dim)


@triton.jit(do_not_specialize=["capacity"])
def _remove_kernel(  # type: ignore[no-untyped-def]
    keys, values, positions, scores, exempted, similarity, slots, evicted, evicted_key, kv_heads, capacity, head_dim,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Subtract the similarities with the evicted token from the sums of a split, and move the new token to its row."""
    pdl_wait(USE_PDL)
    pair = tl.program_id(0).to(tl.int64)
    victim, new_row = tl.load(evicted + pair * 3), tl.load(evicted + pair * 3 + 1)
    victim_exempted_row = tl.load(evicted + pair * 3 + 2)
    if victim >= 0:
        slot = tl.load(slots + tl.program_id(0) // kv_heads).to(tl.int64)
        base = (slot * kv_heads + tl.program_id(0) % kv_heads) * capacity
        channel = tl.arange(0, BLOCK_D)[None, :]
        unit = tl.load(evicted_key + pair * head_dim + channel, mask=channel < head_dim, other=0.0)
        start, end = split_range(new_row + 1, tl.program_id(1), BLOCK_T, SPLITS)
        for first in tl.range(start, end, BLOCK_T):
            row = first + tl.arange(0, BLOCK_T)
            mask = (row < end) & (row != victim)
            offset = (base + row)[:, None] * head_dim + channel
            key = tl.load(keys + offset, mask=mask[:, None] & (channel < head_dim), other=0.0)
            exact = key.to(tl.float32)
            cosine = tl.sum(exact * unit, axis=1) * _inverse_norm(exact)
            sums = tl.load(scores + base + row, mask=mask, other=0.0) - tl.where(
                row == victim_exempted_row, 0.0, cosine
            )
            exempted_row = tl.load(exempted + base + row, mask=mask, other=-1)
            exempted_row = tl.where(exempted_row == victim, -1, tl.where(exempted_row == new_row, victim, exempted_row))
            is_new = row == new_row
            target = base + tl.where(is_new, victim, row)
            tl.store(scores + target, sums, mask=mask)
            tl.store(exempted + target, exempted_row, mask=mask)
            is_moved = mask & is_new
            tl.store(similarity + target, tl.load(similarity + base + row, mask=is_moved, other=0.0), mask=is_moved)
            tl.store(positions + target, tl.load(positions + base + row, mask=is_moved, other=0), mask=is_moved)
            moved = is_moved[:, None] & (channel < head_dim)
            tl.store(keys + target[:, None] * head_dim + channel, key, mask=moved)
            value = tl.load(values + offset, mask=moved, other=0.0)
            tl.store(values + target[:, None] * head_dim + channel, value, mask=moved)
