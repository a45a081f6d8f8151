"""Attention over quantised tokens that multiplies by their codes instead of dequantising them."""

from sparsecache.kernels._triton import tl, triton


@triton.jit
def code_plane(words, PLANE: tl.constexpr, BITS: tl.constexpr, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
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
def concatenate(planes):  # type: ignore[no-untyped-def]
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
def _rows(x):  # type: ignore[no-untyped-def]
    """Return the rows of x [N, A, B] along its first axis as a tuple of N tensors. N is a power of two."""
    if x.shape[0] == 1:
        rows = (tl.reshape(x, (x.shape[1], x.shape[2])),)
    elif x.shape[0] == 2:
        rows = tl.split(tl.permute(x, (1, 2, 0)))
    else:
        half: tl.constexpr = x.shape[0] // 2
        first, second = tl.split(tl.permute(tl.reshape(x, (2, half, x.shape[1], x.shape[2])), (1, 2, 3, 0)))
        rows = _rows(first) + _rows(second)
    return rows


@triton.jit
def position_of_place(pages, place, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the position of the token at a place of a list of pages of PAGE tokens; with PAGE = 0 the place itself."""
    position = place
    if PAGE > 0:
        position = tl.load(pages + place // PAGE) * PAGE + place % PAGE
    return position


@triton.jit
def _first_token(pages, place, end, num_coded, PAGE: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the first token of the tile at a place, and whether the tile counts.

    One that does not count, because it is after the end or not quantised, is replaced by one that exists.
    """
    token = position_of_place(pages, tl.minimum(place, end - TILE), PAGE)
    counts = place < end
    if PAGE > 0:
        counts &= token < num_coded
        token = tl.where(token < num_coded, token, 0)
    return token, counts


@triton.jit
def attend_on_codes(  # type: ignore[no-untyped-def]
    q, q_head_stride, key_codes, key_ranges, value_codes, value_ranges, pages, cut_start, num_cut, num_coded, start,
    end, scale, channel, in_head,
    PAGE: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr,
    WORDS: tl.constexpr, VALUE_GROUPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, SLOTS: tl.constexpr, TILES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Attend to the quantised tokens from start to end; return maximum [R], sum of weights [R], total [R, D].

    start, end: multiples of TOKENS, so that groups are whole. With PAGE > 0 they are places in a list of pages of PAGE
    tokens, multiples of a tile, which divides PAGE. Tokens from num_coded on, and num_cut of them from cut_start on, do
    not count.
    q: pointer to the first of the GROUP query heads of a KV head, which are the first of R rows. channel, in_head: the
    channels in the order of their codes, and which exist. Other pointers are those of the KV head in a slot.

    Codes are not dequantised. The bits of a code, read as float16, are the code times the smallest float16 number. The
    queries are scaled so that their largest entry is near 1, and multiplied by the steps of the keys. The weights are
    multiplied by the steps of the values. Separate products add the minima.

    Codes are the left operands of all products, since a tensor core product has 16 rows but only 8 columns. A query has
    SLOTS columns. In a product with keys they are for the steps of the tiles of an iteration, and in one with values
    for the steps of consecutive value groups. So BLOCK_C / SLOTS blocks of planes have weights of their own.

    A value is the middle of its group's range, plus step * (code - middle code). So the rounding of a weight times a
    step is multiplied by at most half the range. These products are float16, which rounds less than bfloat16. They
    overflow if the range of a group is wider than 196,000.
    """
    dtype: tl.constexpr = q.dtype.element_ty
    planes: tl.constexpr = 16 // BITS
    blocks: tl.constexpr = BLOCK_C // SLOTS
    planes_per_block: tl.constexpr = planes // blocks
    block_d: tl.constexpr = planes * BLOCK_W
    block_q: tl.constexpr = BLOCK_N // SLOTS
    tile: tl.constexpr = BLOCK_T if BLOCK_T < TOKENS else TOKENS
    key_slots: tl.constexpr = SLOTS if SLOTS < TILES else TILES  # tiles whose steps share a product
    copies: tl.constexpr = 16 if TILES == 1 else 8  # rows of equal minima, since a product has 16 rows
    block_x: tl.constexpr = 2 * BLOCK_C if BLOCK_C > 8 else 16
    selected: tl.constexpr = 16 if blocks * BLOCK_N < 16 else blocks * BLOCK_N
    middle: tl.constexpr = ((1 << BITS) - 1) / 2
    code_scale: tl.constexpr = 2.0**24  # 1 / the smallest float16 number
    weight_factor: tl.constexpr = 2.0 ** (BITS - 2)  # so that small weights times steps do not become subnormal
    word, at_range, column = tl.arange(0, BLOCK_W), tl.arange(0, block_x), tl.arange(0, BLOCK_N)
    in_words, in_ranges = word < WORDS, at_range < 2 * VALUE_GROUPS
    plane_scale = tl.exp2((tl.arange(0, block_d) // BLOCK_W % (8 // BITS) * BITS).to(tl.float32))
    q_mask = in_head[:, None] & (column // SLOTS < GROUP)[None, :]
    q_columns = tl.load(q + (column // SLOTS)[None, :] * q_head_stride + channel[:, None], mask=q_mask, other=0.0)
    queries = q_columns.to(tl.float32)
    query_scale = tl.exp2(tl.floor(tl.log2(tl.maximum(tl.max(tl.abs(queries), axis=0), 1e-30))))
    scaled_queries = _to_float16((queries / query_scale[None, :] / plane_scale[:, None]).to(dtype), INTERPRETED)
    query_planes = _rows(tl.reshape(scaled_queries, (planes, BLOCK_W, BLOCK_N)))
    score_unit = tl.max(tl.reshape(query_scale, (block_q, SLOTS)), axis=1) * (scale * code_scale)

    maximum = tl.full((block_q,), float("-inf"), dtype=tl.float32)
    weight_sums = tl.zeros((tile, block_q), dtype=tl.float32)
    range_sums = tl.zeros((block_x, BLOCK_N), dtype=tl.float32)
    step_sums, totals = (), ()
    # The product of it and a token's ranges is the step of each column of each block.
    at_column = tl.arange(0, selected)
    group = at_column // BLOCK_N * SLOTS + at_column % SLOTS
    step_selector = tl.where(at_range[None, :] == (VALUE_GROUPS + group)[:, None], weight_factor, 0.0).to(dtype)
    for _ in tl.static_range(blocks):
        step_sums = step_sums + (tl.zeros((16, BLOCK_N), dtype=tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for _ in tl.static_range(planes):
        totals = totals + (tl.zeros((BLOCK_W, BLOCK_N), dtype=tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for first in tl.range(start, end, TILES * tile):
        # Scores of tiles that do not count are -inf.
        begins = _first_token(pages, first + tl.arange(0, TILES) * tile, end, num_coded, PAGE, tile)[0]
        at_minima = key_ranges + (begins // TOKENS * (2 * HEAD_DIM))[:, None] + channel[None, :]
        minima = tl.load(at_minima, mask=in_head[None, :], other=0.0)
        minima = tl.reshape(tl.broadcast_to(minima[:, None, :], (TILES, copies, block_d)), (TILES * copies, block_d))
        offsets = tl.reshape(tl.dot(minima, q_columns) * scale, (TILES * copies, block_q, SLOTS))
        offsets = _rows(tl.reshape(tl.max(offsets, axis=2), (TILES, copies, block_q)))  # equal over slots
        scores = ()
        for index in tl.static_range(TILES):
            if index % key_slots == 0:
                places = first + (index + tl.arange(0, SLOTS) % key_slots) * tile
                begins = _first_token(pages, places, end, num_coded, PAGE, tile)[0]
                at_steps = key_ranges + (begins // TOKENS * (2 * HEAD_DIM))[None, :] + (channel + HEAD_DIM)[:, None]
                step = tl.load(at_steps, mask=in_head[:, None], other=0.0)
                step_planes = _rows(tl.reshape(step, (planes, BLOCK_W, SLOTS)))
                stepped_queries = ()
                for plane in tl.static_range(planes):
                    step = tl.broadcast_to(
                        _to_float16(step_planes[plane], INTERPRETED)[:, None, :], (BLOCK_W, block_q, SLOTS)
                    )
                    stepped_queries = stepped_queries + (query_planes[plane] * tl.reshape(step, (BLOCK_W, BLOCK_N)),)  # type: ignore[assignment]  # noqa: RUF005
            begin, counts = _first_token(pages, first + index * tile, end, num_coded, PAGE, tile)
            token = begin + tl.arange(0, tile)
            words = tl.load(key_codes + token[:, None] * WORDS + word[None, :], mask=in_words[None, :], other=0)
            products = tl.zeros((tile, BLOCK_N), dtype=tl.float32)
            for plane in tl.static_range(planes):
                products = tl.dot(code_plane(words, plane, BITS, INTERPRETED), stepped_queries[plane], products)
            products = tl.reshape(products, (tile, block_q, SLOTS))
            # A maximum of a number and -inf is no instruction. After `tl.split`, exponentials were computed twice.
            is_slot = (tl.arange(0, SLOTS) == index % key_slots)[None, None, :]
            products = tl.max(tl.where(is_slot, products, float("-inf")), axis=2)
            # Without pages the first tile always counts.
            offset = offsets[index] if index + PAGE == 0 else tl.where(counts, offsets[index], float("-inf"))
            offset = tl.reshape(tl.broadcast_to(offset[None, :, :], (tile // copies, copies, block_q)), (tile, block_q))
            score = products * score_unit[None, :] + offset
            if PAGE > 0:
                is_cut = (token >= cut_start) & (token < cut_start + num_cut)
                score = tl.where(is_cut[:, None], float("-inf"), score)
            scores = scores + (score,)  # type: ignore[assignment]  # noqa: RUF005
        largest = scores[0]  # type: ignore[misc]
        for index in tl.static_range(1, TILES):
            largest = tl.maximum(largest, scores[index])
        new_maximum = tl.maximum(maximum, tl.max(largest, axis=0))
        base = new_maximum
        if PAGE > 0:  # no token may count
            base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        rescale = tl.exp2(maximum - base)
        maximum = new_maximum
        weight_sums *= rescale[None, :]
        rescale = tl.reshape(tl.broadcast_to(rescale[:, None], (block_q, SLOTS)), (1, BLOCK_N))
        range_sums *= rescale
        new_step_sums, new_totals = (), ()
        for block in tl.static_range(blocks):
            new_step_sums = new_step_sums + (step_sums[block] * rescale,)  # type: ignore[assignment]  # noqa: RUF005
        for plane in tl.static_range(planes):
            new_totals = new_totals + (totals[plane] * rescale,)  # type: ignore[assignment]  # noqa: RUF005
        step_sums, totals = new_step_sums, new_totals
        for index in tl.static_range(TILES):
            begin = _first_token(pages, first + index * tile, end, num_coded, PAGE, tile)[0]
            token = begin + tl.arange(0, tile)
            weights = tl.exp2(scores[index] - base[None, :])
            weight_sums += weights
            # Words and ranges are loaded transposed, since operands of products are pipelined only if not transposed.
            at_ranges = value_ranges + token[None, :] * (2 * VALUE_GROUPS) + at_range[:, None]
            ranges = tl.load(at_ranges, mask=in_ranges[:, None], other=0.0)
            columns = tl.broadcast_to(weights.to(dtype)[:, :, None], (tile, block_q, SLOTS))
            range_sums = tl.dot(ranges, tl.reshape(columns, (tile, BLOCK_N)), range_sums)
            steps = tl.dot(step_selector, ranges).to(tl.float16)
            steps = _rows(tl.reshape(steps, (selected // BLOCK_N, BLOCK_N, tile)))
            columns = tl.broadcast_to(weights.to(tl.float16)[:, :, None], (tile, block_q, SLOTS))
            columns = tl.reshape(columns, (tile, BLOCK_N))
            words = tl.load(value_codes + token[None, :] * WORDS + word[:, None], mask=in_words[:, None], other=0)
            new_step_sums, new_totals = (), ()
            for block in tl.static_range(blocks):
                weighted_steps = columns * tl.trans(steps[block])
                step_sum = tl.dot(tl.full((16, tile), 1.0, tl.float16), weighted_steps, step_sums[block])  # equal rows
                new_step_sums = new_step_sums + (step_sum,)  # type: ignore[assignment]  # noqa: RUF005
                for plane in tl.static_range(block * planes_per_block, (block + 1) * planes_per_block):
                    total = tl.dot(code_plane(words, plane, BITS, INTERPRETED), weighted_steps, totals[plane])
                    new_totals = new_totals + (total,)  # type: ignore[assignment]  # noqa: RUF005
            step_sums, totals = new_step_sums, new_totals
    parts = ()
    for plane in tl.static_range(planes):
        if plane % planes_per_block == 0:
            group = plane // planes_per_block * SLOTS + column % SLOTS
            range_weights = tl.where(at_range[:, None] == group[None, :], 1.0, 0.0)
            range_weights += tl.where(at_range[:, None] == (VALUE_GROUPS + group)[None, :], middle, 0.0)
            step_sum = tl.max(step_sums[plane // planes_per_block], axis=0)
            offset = tl.sum(range_sums * range_weights, axis=0) - step_sum * (middle / weight_factor)
        part = totals[plane] * (code_scale / weight_factor / 2 ** (plane % (8 // BITS) * BITS)) + offset[None, :]
        parts = parts + (tl.trans(part),)  # type: ignore[assignment]  # noqa: RUF005
    query = tl.minimum(tl.arange(0, BLOCK_R), block_q - 1)
    weight_sum = tl.gather(tl.sum(weight_sums, axis=0), query, axis=0)
    column_of_channel = (query * SLOTS)[:, None] + (channel // TOKENS % SLOTS)[None, :]
    total = tl.gather(concatenate(parts), column_of_channel, axis=0)
    return tl.gather(maximum, query, axis=0), weight_sum, total
