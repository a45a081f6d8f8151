"""Attention over quantised tokens that are dequantised in registers, each by the ranges of its own group."""

from sparsecache.kernels._triton import tl, triton
from sparsecache.kernels.attention_on_codes import concatenate


@triton.jit
def _dequantise(words, minimum, step, PLANE: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return minimum + step * code of one code per word, [N, W] as all arguments, in the dtype of the ranges.

    PACKED: two codes per instruction. A code becomes the low bits of the number 128 in bfloat16, or 1024 in float16.
    """
    shift: tl.constexpr = PLANE * BITS
    mask: tl.constexpr = (1 << BITS) - 1
    if not PACKED:
        code = ((words >> shift) & mask).to(tl.float32)
        return (code * step.to(tl.float32) + minimum.to(tl.float32)).to(step.dtype)
    pair: tl.constexpr = mask << 16 | mask
    kind: tl.constexpr = "bf16x2" if step.dtype == tl.bfloat16 else "f16x2"
    base: tl.constexpr = 0x43004300 if step.dtype == tl.bfloat16 else 0x64006400
    one: tl.constexpr = 0x3F803F80 if step.dtype == tl.bfloat16 else 0x3C003C00
    negative_base: tl.constexpr = base | 0x80008000
    return tl.inline_asm_elementwise(
        f"{{ .reg .b32 code, one, less; mov.b32 one, {one}; mov.b32 less, {negative_base}; shr.u32 code, $1, {shift}; "
        f"and.b32 code, code, {pair}; or.b32 code, code, {base}; fma.rn.{kind} code, code, one, less; "
        f"fma.rn.{kind} $0, code, $2, $3; }}",
        "=r,r,r,r", [words, step, minimum], dtype=step.dtype, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _value_ranges(  # type: ignore[no-untyped-def]
    ranges, token, mask, channel, in_head, PLANE: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Return the minima, or with ranges + VALUE_GROUPS the steps, of tokens [N] in the channels of a plane: [N, W]."""
    ranges += token[:, None] * (2 * VALUE_GROUPS)
    if WORDS == BLOCK_W and (WORDS % TOKENS == 0 or TOKENS % WORDS == 0):  # whole groups, or a part of one: loaded once
        groups: tl.constexpr = WORDS // TOKENS if WORDS > TOKENS else 1
        group = PLANE * WORDS // TOKENS + tl.arange(0, groups)
        found = tl.load(ranges + group[None, :], mask=mask[:, None] & (group < VALUE_GROUPS)[None, :], other=0.0)
        shape: tl.constexpr = (token.shape[0], groups, WORDS // groups)
        return tl.reshape(tl.broadcast_to(found[:, :, None], shape), (token.shape[0], WORDS))
    return tl.load(ranges + (channel // TOKENS)[None, :], mask=mask[:, None] & in_head[None, :], other=0.0)


@triton.jit
def attend_dequantised(  # type: ignore[no-untyped-def]
    q, q_head_stride, key_codes, key_ranges, value_codes, value_ranges, indices, start, end, num_coded, scale,
    SELECTED: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr, WORDS: tl.constexpr, VALUE_GROUPS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Attend to the quantised tokens among those from start to end.

    Return maximum [R], sum of weights [R], total [R, D], channels in the order of their codes, and the first place from
    start to end whose token is not among the first num_coded ones, else end. SELECTED: the tokens are indices at these
    places, in any order, else the places themselves. q: pointer to the first of the GROUP query heads of a KV head,
    which are the first of R rows. Other pointers are those of the KV head in a slot.

    Channels are taken plane by plane, so that codes and ranges of a plane meet in the same registers.
    """
    planes: tl.constexpr = 16 // BITS
    query, word = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_W)
    maximum = tl.full((BLOCK_R,), float("-inf"), dtype=tl.float32)
    weight_sum = tl.zeros((BLOCK_R,), dtype=tl.float32)
    query_planes, totals = (), ()
    for plane in tl.static_range(planes):
        channel = plane * WORDS + word
        q_mask = (query < GROUP)[:, None] & ((word < WORDS) & (channel < HEAD_DIM))[None, :]
        rows = tl.load(q + query[:, None] * q_head_stride + channel[None, :], mask=q_mask, other=0.0)
        query_planes = query_planes + (rows,)  # type: ignore[assignment]  # noqa: RUF005
        totals = totals + (tl.zeros((BLOCK_R, BLOCK_W), dtype=tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    first_whole = end
    for first in tl.range(start, end, BLOCK_T):
        at = first + tl.arange(0, BLOCK_T)
        token = at
        if SELECTED:
            token = tl.load(indices + at, mask=at < end, other=0).to(tl.int32)
        is_coded = (at < end) & (token < num_coded)
        first_whole = tl.minimum(first_whole, tl.min(tl.where((at < end) & (token >= num_coded), at, end)))
        at_words = token[:, None] * WORDS + word[None, :]
        words_mask = is_coded[:, None] & (word < WORDS)[None, :]
        at_ranges = key_ranges + (token // TOKENS)[:, None] * (2 * HEAD_DIM)
        words = tl.load(key_codes + at_words, mask=words_mask, other=0)
        scores = tl.zeros((BLOCK_R, BLOCK_T), dtype=tl.float32)
        for plane in tl.static_range(planes):
            channel = plane * WORDS + word
            range_mask = is_coded[:, None] & ((word < WORDS) & (channel < HEAD_DIM))[None, :]
            minimum = tl.load(at_ranges + channel[None, :], mask=range_mask, other=0.0)
            step = tl.load(at_ranges + (HEAD_DIM + channel)[None, :], mask=range_mask, other=0.0)
            key = _dequantise(words, minimum, step, plane, BITS, PACKED)
            scores = tl.dot(query_planes[plane], tl.trans(key), scores, input_precision="ieee")
        scores = tl.where(is_coded[None, :], scores * scale, float("-inf"))
        maximum_so_far = tl.maximum(maximum, tl.max(scores, axis=1))
        base = tl.where(maximum_so_far == float("-inf"), 0.0, maximum_so_far)  # no token of these is quantised
        weights, rescale = tl.exp2(scores - base[:, None]), tl.exp2(maximum - base)
        weight_sum = weight_sum * rescale + tl.sum(weights, axis=1)
        maximum = maximum_so_far
        words = tl.load(value_codes + at_words, mask=words_mask, other=0)
        new_totals = ()
        for plane in tl.static_range(planes):
            channel = plane * WORDS + word
            in_head = (word < WORDS) & (channel < HEAD_DIM)
            minimum = _value_ranges(
                value_ranges, token, is_coded, channel, in_head, plane, TOKENS, WORDS, VALUE_GROUPS, BLOCK_W
            )
            step = _value_ranges(
                value_ranges + VALUE_GROUPS, token, is_coded, channel, in_head, plane, TOKENS, WORDS, VALUE_GROUPS,
                BLOCK_W,
            )  # fmt: skip
            value = _dequantise(words, minimum, step, plane, BITS, PACKED)
            total = tl.dot(weights.to(value.dtype), value, totals[plane] * rescale[:, None], input_precision="ieee")
            new_totals = new_totals + (total,)  # type: ignore[assignment]  # noqa: RUF005
        totals = new_totals
    return maximum, weight_sum, concatenate(totals), first_whole
