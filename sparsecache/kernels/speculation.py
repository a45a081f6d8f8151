"""Score past tokens by partial keys with a speculated query, as in InfiniGen."""

import math

import torch
from torch import Tensor

from sparsecache.kernels._triton import (
    INTERPRETED,
    next_power_of_2,
    pdl_options,
    pdl_wait,
    saturating_programs,
    tl,
    triton,
    use_kernel,
)
from sparsecache.kernels.attention_on_codes import code_plane
from sparsecache.kernels.partial_codes import PartialCodes
from sparsecache.kernels.rows import index_slots
from sparsecache.kernels.scores import partial_query, scaled_scores
from sparsecache.kernels.threshold import Scores, split_range

_MAX_BLOCK_T, _WARPS, _STAGES = 128, 4, 4  # tokens per iteration, unless their keys have less than _MIN_TILE_BYTES
_MAX_CODE_BLOCK_T = 256  # of codes
_MIN_TILE_BYTES, _TILE_BYTES = 8192, 16384  # bytes of keys per iteration: fewer do not hide the latency of memory
_MAX_SPLITS = 64
_LONG_SPLIT = 1024  # tokens
_MAX_HALF = tl.constexpr(65504)  # the largest float16


def speculated_scores(
    q: Tensor,
    projection: Tensor | None,
    keys: Tensor | PartialCodes,
    seq_lens: Tensor,
    slots: Tensor,
    high_priority: bool = False,
    with_sums: bool = False,
) -> Scores:
    """Score the past tokens of each slot by partial keys, for `threshold_select`.

    q: [B, H, 1, D]; projection: [slots, G, D, I] float32, from queries and keys to I partial channels; None: `keys` are
    the keys themselves, I = D. keys: [slots, G, T, I], or their codes; seq_lens: [slots] int64, past tokens, at most T;
    slots: [B]. high_priority: whether the kernel runs on a stream of high priority. It affects speed alone. with_sums:
    whether the kernel also sums exp(score), which selecting with group "softmax" needs.

    Scores by codes leave out the query times the center. It is equal for all tokens of a query head, so it changes
    neither their order, nor their distances to the best score, nor a softmax over them.
    """
    if use_kernel(q):
        return _launch(q, projection, keys, seq_lens, slots, high_priority, with_sums)
    longest = int(seq_lens[slots].max())
    if isinstance(keys, PartialCodes):
        values = keys.decode(slots, longest)
    else:
        values = index_slots(keys[:, :, :longest], slots)
    partial_q = q if projection is None else partial_query(q, projection, slots)
    scores, kv_heads = scaled_scores(partial_q, values, q.shape[3]), values.shape[1]
    return Scores(scores.view(len(q), kv_heads, q.shape[1] // kv_heads, longest), None)


def _launch(
    q: Tensor,
    projection: Tensor | None,
    keys: Tensor | PartialCodes,
    seq_lens: Tensor,
    slots: Tensor,
    high_priority: bool,
    with_sums: bool,
) -> Scores:
    batch, heads, _, head_dim = q.shape
    rows, step, _, bits = keys if isinstance(keys, PartialCodes) else (keys, None, None, 16)
    channels = rows.shape[3] if step is None else step.shape[2]
    rows = rows if step is None else rows.view(torch.int16)
    kv_heads, capacity, width = rows.shape[1:]
    group, device = heads // kv_heads, q.device
    splits = _split_count(batch, kv_heads, capacity, device, high_priority)
    stride = -(-capacity // 16) * 16  # rows of scores are aligned, so that wide loads are possible
    # float16 moves half as much. Its 11 bits are enough: bfloat16 keys have 8 bits, float16 keys as many.
    dtype = torch.float32 if (rows if step is None else q).dtype == torch.float32 else torch.float16
    scores = torch.empty((batch, kv_heads, group, stride), device=device, dtype=dtype)
    extremes = torch.empty((3 if with_sums else 2, batch, heads, splits), device=device, dtype=torch.float32)
    block_i, max_block_t = next_power_of_2(width, 16), _MAX_BLOCK_T if step is None else _MAX_CODE_BLOCK_T
    row_bytes = block_i * rows.element_size()
    _score_kernel[(batch * kv_heads, splits)](
        q, q.stride(0), q.stride(1), q if projection is None else projection, rows, step, seq_lens, slots, scores,
        extremes, 1 / math.sqrt(head_dim), kv_heads, capacity, stride, head_dim, channels, width,
        extremes[0].numel(), BITS=bits, PROJECTED=projection is not None,
        BLOCK_D=next_power_of_2(head_dim, 16), BLOCK_I=block_i, GROUP=group, BLOCK_Q=next_power_of_2(group, 8),
        BLOCK_T=min(max(max_block_t, _MIN_TILE_BYTES // row_bytes), _TILE_BYTES // row_bytes),
        SPLITS=splits, WITH_SUMS=with_sums, INTERPRETED=INTERPRETED,
        num_warps=_WARPS, num_stages=_STAGES, **pdl_options(),
    )  # fmt: skip
    return Scores(scores, extremes)


def _split_count(batch: int, kv_heads: int, capacity: int, device: torch.device, high_priority: bool) -> int:
    """Return how many splits each slot has, so that scoring and selection fill the GPU.

    The projections of one sequence are thousands of small programs. Beside them half as many splits disturb less,
    unless this kernel has priority and long splits.
    """
    splits = saturating_programs(device) // (batch * kv_heads)
    if batch == 1 and not (high_priority and capacity >= _LONG_SPLIT * splits):
        splits //= 2
    return max(1, min(_MAX_SPLITS, splits))


@triton.jit
def _stepped_query(  # type: ignore[no-untyped-def]
    q, projection, step, head_dim, channels, at, inside, query_mask, BLOCK_D: tl.constexpr, PROJECTED: tl.constexpr
):  # fmt: skip
    """Return the query's partial channels `at` times their steps, float32: [BLOCK_I, BLOCK_Q].

    q: pointers to the query heads [1, BLOCK_Q]; projection, step: pointers to those of a slot and KV head. inside:
    which of the channels exist; query_mask: which of the heads [1, BLOCK_Q].
    """
    if PROJECTED:
        d = tl.arange(0, BLOCK_D)
        q_block = tl.load(q + d[:, None], mask=(d < head_dim)[:, None] & query_mask, other=0.0)
        mask = inside[:, None] & (d < head_dim)[None, :]
        block = tl.load(projection + d[None, :] * channels + at[:, None], mask=mask, other=0.0)
        partial = tl.dot(block, q_block.to(tl.float32), input_precision="ieee")
    else:
        partial = tl.load(q + at[:, None], mask=inside[:, None] & query_mask, other=0.0).to(tl.float32)
    return partial * tl.load(step + at, mask=inside, other=0.0)[:, None]


@triton.jit
def _query_of_codes(  # type: ignore[no-untyped-def]
    q, projection, step, head_dim, channels, word, query_mask, scale, BITS: tl.constexpr, PROJECTED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Return what scores codes: the query per plane [BLOCK_I, BLOCK_Q], an offset and a unit [BLOCK_Q].

    A score is unit * (sum of codes * query over planes and words) - offset. word: [BLOCK_I], of a token's codes. scale:
    of the scores. Other arguments: as in `_stepped_query`.
    """
    per_byte: tl.constexpr = 8 // BITS
    partials, queries = (), ()
    largest = tl.full((BLOCK_Q,), 1e-30, dtype=tl.float32)
    for plane in tl.static_range(16 // BITS):
        byte = 2 * word + plane // per_byte
        at, inside = byte + plane % per_byte * (channels // per_byte), byte < channels // per_byte
        partial = _stepped_query(
            q, projection, step, head_dim, channels, at, inside, query_mask, BLOCK_D, PROJECTED
        )  # fmt: skip
        largest = tl.maximum(largest, tl.max(tl.abs(partial), axis=0))
        partials = partials + (partial,)  # type: ignore[assignment]  # noqa: RUF005
    # In float16 a query is scaled so that it is neither subnormal nor infinite. It is rounded to 11 bits, far less than
    # the codes are. A plane in float16 is its codes times 2^-24, and in the high halves of bytes times 2^BITS.
    shift: tl.constexpr = BITS if dtype == tl.float16 else 0
    code_scale: tl.constexpr = 2.0**24 if dtype == tl.float16 else 1.0
    unit = tl.full((BLOCK_Q,), 1.0, dtype=tl.float32)
    if dtype == tl.float16:
        unit = tl.exp2(tl.floor(tl.log2(largest)) - 8.0)
    # A code stands for its distance to the middle of all codes. The offset is equal for all tokens, but is not left
    # out: larger scores would be rounded more.
    offset = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    for plane in tl.static_range(16 // BITS):
        query = (partials[plane] / unit[None, :] * (2.0 ** -(plane % per_byte * shift))).to(dtype)
        offset += tl.sum(query.to(tl.float32), axis=0) * (((1 << BITS) - 1) / 2 * 2.0 ** (plane % per_byte * shift))
        queries = queries + (query,)  # type: ignore[assignment]  # noqa: RUF005
    return queries, offset * unit * scale, unit * (scale * code_scale)


@triton.jit
def _plane(words, PLANE: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return one code per word: in float16 as `code_plane`, in float32 the code itself."""
    if dtype == tl.float16:
        codes = code_plane(words, PLANE, BITS, INTERPRETED)
    else:
        codes = ((words >> (PLANE * BITS)) & ((1 << BITS) - 1)).to(dtype)
    return codes


@triton.jit(do_not_specialize=["capacity"])
def _score_kernel(  # type: ignore[no-untyped-def]
    q, q_row_stride, q_head_stride, projection, keys, step, seq_lens, slots, scores, extremes, scale, kv_heads,
    capacity, stride, head_dim, channels, width, extremes_size,
    BITS: tl.constexpr, PROJECTED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr,
    WITH_SUMS: tl.constexpr, INTERPRETED: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Score one split of a slot for the query heads of a KV head; find each head's extremes.

    BITS: 8 or 4 for codes, else 16. width: of a token's partial key, its channels, or the int16 words of its codes.

    Codes are not dequantised: the query is multiplied by the steps. A plane is one code of each word, at the same bits.
    """
    pdl_wait(USE_PDL)
    row, kv, split = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads, tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    count = tl.load(seq_lens + slot)
    query, at, channel = tl.arange(0, BLOCK_Q)[None, :], tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_I)
    head = kv * GROUP + query
    dtype: tl.constexpr = tl.float32 if q.dtype.element_ty == tl.float32 else tl.float16  # of products with codes
    if BITS == 16:
        width = channels
        q_mask = (query < GROUP) & (at < head_dim)[:, None]
        q_ptr = q + row * q_row_stride + head * q_head_stride + at[:, None]
        q_block = tl.load(q_ptr, mask=q_mask, other=0.0)
        owner = slot * kv_heads + kv
        if PROJECTED:
            projection_block = tl.load(
                projection + (owner * head_dim + at[None, :]) * channels + channel[:, None],
                mask=(at < head_dim)[None, :] & (channel < channels)[:, None], other=0.0,
            )  # fmt: skip
            partial = tl.dot(projection_block, q_block.to(tl.float32), input_precision="ieee")  # [BLOCK_I, BLOCK_Q]
            # The query is the sum of two values in the dtype of the keys: rounding it to one would change selections.
            q_high = partial.to(keys.dtype.element_ty)
            q_low = (partial - q_high.to(tl.float32)).to(keys.dtype.element_ty)
        else:
            q_high = q_block.to(keys.dtype.element_ty)
    else:
        owner = slot * kv_heads + kv
        if PROJECTED:
            projection += owner * head_dim * channels
        queries, offset, unit = _query_of_codes(
            q + row * q_row_stride + head * q_head_stride, projection, step + owner * channels, head_dim, channels,
            channel, query < GROUP, scale, BITS, PROJECTED, BLOCK_D, BLOCK_Q, dtype,
        )  # fmt: skip

    best = tl.full((BLOCK_T, BLOCK_Q), float("-inf"), dtype=tl.float32)  # reduced over BLOCK_T after the loop
    worst = tl.full((BLOCK_T, BLOCK_Q), float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_T, BLOCK_Q), dtype=tl.float32)  # sums of exp(score - best)
    start, end = split_range(count, split, BLOCK_T, SPLITS)
    for first in tl.range(start, end, BLOCK_T):
        token = (first + tl.arange(0, BLOCK_T))[:, None]
        mask = (token < end) & (channel < width)[None, :]
        if BITS == 16:
            key = tl.load(keys + (owner * capacity + token) * width + channel[None, :], mask=mask, other=0.0)
            score = tl.dot(key, q_high, input_precision="ieee")
            if PROJECTED:
                score = tl.dot(key, q_low, score, input_precision="ieee")
            score *= scale
        else:
            words = tl.load(keys + (owner * capacity + token) * width + channel[None, :], mask=mask, other=0)
            score = tl.zeros((BLOCK_T, BLOCK_Q), dtype=tl.float32)
            for plane in tl.static_range(16 // BITS):
                codes = _plane(words, plane, BITS, dtype, INTERPRETED)
                score = tl.dot(codes, queries[plane], score, input_precision="ieee")
            score = score * unit[None, :] - offset[None, :]
        if scores.dtype.element_ty == tl.float16:
            # The extremes are those of the stored scores. Clamped, because a margin from infinity is NaN.
            score = tl.minimum(tl.maximum(score, -_MAX_HALF), _MAX_HALF).to(tl.float16).to(tl.float32)
        if WITH_SUMS:
            lower = tl.where(token < end, tl.exp(-tl.abs(score - best)), 0.0)  # the smaller weight over the larger one
            total = tl.where((token < end) & (score > best), total * lower + 1.0, total + lower)
        best = tl.maximum(best, tl.where(token < end, score, float("-inf")))
        worst = tl.minimum(worst, tl.where(token < end, score, float("inf")))
        target = scores + (row * kv_heads * GROUP + head).to(tl.int64) * stride + token
        inside = (query < GROUP) & (token < stride)
        # The selection reads the scores next; weights that stream through L2 meanwhile must not evict them.
        tl.store(target, score, mask=inside, eviction_policy="evict_last")
    extreme = extremes + (row * kv_heads * GROUP + kv * GROUP + tl.arange(0, BLOCK_Q)) * SPLITS + split
    highest = tl.max(best, axis=0)
    tl.store(extreme, highest, mask=tl.arange(0, BLOCK_Q) < GROUP)
    tl.store(extreme + extremes_size, tl.min(worst, axis=0), mask=tl.arange(0, BLOCK_Q) < GROUP)
    if WITH_SUMS:
        # Without tokens the best score is -inf, and the difference of two would be NaN.
        total = tl.sum(total * tl.exp(best - tl.maximum(highest, -3e38)[None, :]), axis=0)
        tl.store(extreme + 2 * extremes_size, total, mask=tl.arange(0, BLOCK_Q) < GROUP)
