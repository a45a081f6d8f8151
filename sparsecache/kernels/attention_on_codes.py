"""Attention over quantised tokens that multiplies by their codes instead of dequantising them."""

from sparsecache.kernels._triton import tl, triton


@triton.jit
def _plane(words, PLANE: tl.constexpr, BITS: tl.constexpr, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return one code per word as the bits of a float16: code * 2^(bit offset in its byte) * 2^-24, a subnormal."""
    per_byte: tl.constexpr = 8 // BITS
    mask: tl.constexpr = ((1 << BITS) - 1) << (PLANE % per_byte * BITS)
    if INTERPRETED:  # the interpreter has no inline assembly
        field = (words >> (PLANE // per_byte * 8)) & mask
    else:  # two words per instruction
        low: tl.constexpr = "and.b32 $0, $1, $2;"
        high_byte: tl.constexpr = "{ .reg .b32 high; shr.u32 high, $1, 8; and.b32 $0, high, $2; }"
        field = tl.inline_asm_elementwise(
            low if per_byte > PLANE else high_byte, "=r,r,r", [words, tl.full(words.shape, mask, tl.int16)],
            dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    return field.to(tl.float16, bitcast=True)


@triton.jit
def _to_float16(x, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return x in float16. Converting values in pairs lets one instruction multiply a pair."""
    if INTERPRETED or x.dtype == tl.float16:
        return x.to(tl.float16)
    return tl.inline_asm_elementwise(
        "{ .reg .b32 low, high; shl.b32 low, $1, 16; and.b32 high, $1, 0xffff0000; cvt.rn.f16x2.f32 $0, high, low; }",
        "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _concatenate(planes):  # type: ignore[no-untyped-def]
    """Return 2, 4 or 8 tensors [N, W] side by side: [N, 2 * W], [N, 4 * W] or [N, 8 * W]."""
    if len(planes) == 2:
        joined = tl.join(planes[0], planes[1])
    elif len(planes) == 4:
        joined = tl.join(tl.join(planes[0], planes[2]), tl.join(planes[1], planes[3]))
    else:
        even = tl.join(tl.join(planes[0], planes[4]), tl.join(planes[2], planes[6]))
        joined = tl.join(even, tl.join(tl.join(planes[1], planes[5]), tl.join(planes[3], planes[7])))
    rows: tl.constexpr = planes[0].shape[0]
    width: tl.constexpr = planes[0].shape[1]
    joined = tl.permute(tl.reshape(joined, (rows, width, len(planes))), (0, 2, 1))
    return tl.reshape(joined, (rows, len(planes) * width))


@triton.jit
def attend_on_codes(  # type: ignore[no-untyped-def]
    q_block, key_codes, key_ranges, value_codes, value_ranges, start, end, scale, channel, in_head, group,
    BITS: tl.constexpr, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, WORDS: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Attend to the quantised tokens from start to end; return maximum [R], sum of weights [R], total [R, D].

    start, end: multiples of TOKENS, so that groups are whole. group: [R]. Row r of the queries is for the channels of
    value group `group[r]`; other channels of its total are meaningless.

    Codes are not dequantised. The bits of a code, read as float16, are the code times the smallest float16 number. The
    queries are scaled so that their largest entry is near 1, and multiplied by the steps of the keys. The weights are
    multiplied by the steps of the values. Separate products add the minima.

    A value is the middle of its group's range, plus step * (code - middle code). So the rounding of a weight times a
    step is multiplied by at most half the range. These products are float16, which rounds less than bfloat16. They
    overflow if the range of a group is wider than 196,000.
    """
    dtype: tl.constexpr = q_block.dtype
    planes: tl.constexpr = 16 // BITS
    block_d: tl.constexpr = planes * BLOCK_W
    tile: tl.constexpr = BLOCK_T if BLOCK_T < TOKENS else TOKENS
    block_x: tl.constexpr = 2 * BLOCK_C if BLOCK_C > 8 else 16
    middle: tl.constexpr = ((1 << BITS) - 1) / 2
    code_scale: tl.constexpr = 2.0**24  # 1 / the smallest float16 number
    weight_factor: tl.constexpr = 2.0 ** (BITS - 2)  # so that small weights times steps do not become subnormal
    word, at_range, column = tl.arange(0, BLOCK_W), tl.arange(0, block_x), tl.arange(0, block_d)
    in_words, in_ranges = (word < WORDS)[None, :], (at_range < 2 * VALUE_GROUPS)[None, :]
    plane_scale = tl.exp2((column // BLOCK_W % (8 // BITS) * BITS).to(tl.float32))
    queries = q_block.to(tl.float32)
    query_scale = tl.exp2(tl.floor(tl.log2(tl.maximum(tl.max(tl.abs(queries), axis=1), 1e-30))))
    scaled_queries = _to_float16((queries / query_scale[:, None] / plane_scale[None, :]).to(dtype), INTERPRETED)
    score_unit = query_scale * (scale * code_scale)
    # The product with it gives each row the steps of its group.
    step_selector = tl.where(at_range[None, :] == (VALUE_GROUPS + group)[:, None], weight_factor, 0.0).to(dtype)

    maximum = tl.full((BLOCK_R,), float("-inf"), dtype=tl.float32)
    weight_sum = tl.zeros((BLOCK_R,), dtype=tl.float32)
    range_sums = tl.zeros((BLOCK_R, block_x), dtype=tl.float32)
    step_sum = tl.zeros((BLOCK_R, 8), dtype=tl.float32)  # equal columns
    totals = ()
    for _ in tl.static_range(planes):
        totals = totals + (tl.zeros((BLOCK_R, BLOCK_W), dtype=tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for first in tl.range(start, end, tile):
        token = first + tl.arange(0, tile)
        at_codes = token[:, None] * WORDS + word[None, :]
        at_key_range = key_ranges + first // TOKENS * (2 * HEAD_DIM) + channel
        minimum = tl.load(at_key_range, mask=in_head, other=0.0)
        from_minima = tl.dot(q_block, tl.broadcast_to(minimum[:, None], (block_d, 8)))  # equal columns
        offset = tl.max(from_minima, axis=1) * scale
        words = tl.load(key_codes + at_codes, mask=in_words, other=0)
        key_planes = ()
        for plane in tl.static_range(planes):
            key_planes = key_planes + (_plane(words, plane, BITS, INTERPRETED),)  # type: ignore[assignment]  # noqa: RUF005
        step = _to_float16(tl.load(at_key_range + HEAD_DIM, mask=in_head, other=0.0), INTERPRETED)
        scores = tl.dot(scaled_queries * step[None, :], tl.trans(_concatenate(key_planes)))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * score_unit + offset)
        weights = tl.exp2(scores * score_unit[:, None] + (offset - new_maximum)[:, None])
        rescale = tl.exp2(maximum - new_maximum)
        maximum = new_maximum
        weight_sum = weight_sum * rescale + tl.sum(weights, axis=1)
        ranges = tl.load(
            value_ranges + token[:, None] * (2 * VALUE_GROUPS) + at_range[None, :], mask=in_ranges, other=0.0
        )
        steps = tl.dot(step_selector, tl.trans(ranges))
        range_sums = tl.dot(weights.to(dtype), ranges, range_sums * rescale[:, None])
        weights = (weights * steps).to(tl.float16)
        step_sum = tl.dot(weights, tl.full((tile, 8), 1.0, tl.float16), step_sum * rescale[:, None])
        words = tl.load(value_codes + at_codes, mask=in_words, other=0)
        new_totals = ()
        for plane in tl.static_range(planes):
            values = _plane(words, plane, BITS, INTERPRETED)
            total = tl.dot(weights, values, totals[plane] * rescale[:, None])
            new_totals = new_totals + (total,)  # type: ignore[assignment]  # noqa: RUF005
        totals = new_totals
    range_weights = tl.where(at_range[None, :] == group[:, None], 1.0, 0.0)
    range_weights += tl.where(at_range[None, :] == (VALUE_GROUPS + group)[:, None], middle, 0.0)
    offset = tl.sum(range_sums * range_weights, axis=1) - tl.max(step_sum, axis=1) * (middle / weight_factor)
    total = _concatenate(totals) * (code_scale / weight_factor / plane_scale)[None, :] + offset[:, None]
    return maximum, weight_sum, total
