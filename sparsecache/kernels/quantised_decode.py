"""Attention of one new token per sequence over quantised tokens: all of them, or selected ones.

It is flash decoding, with the splits of `decode`. In half precision, attention over all tokens, or over pages of them,
multiplies by their codes without dequantising them. Selected tokens, and tokens in float32, are dequantised in
registers. Tokens of the full-precision tail are read from its ring. All sizes are fixed and lengths are read on the
device, so a decode step can be a CUDA graph.

In one file because all entry points share one kernel.
"""

import math

import torch
from torch import Tensor

from sparsecache.kernels._triton import (
    INTERPRETED,
    next_power_of_2,
    num_sms,
    pdl_launch,
    pdl_options,
    pdl_wait,
    tl,
    triton,
    use_kernel,
)
from sparsecache.kernels.attention_dequantised import attend_dequantised
from sparsecache.kernels.attention_on_codes import attend_on_codes, position_of_place
from sparsecache.kernels.decode import attend_rows, merge_kernel, place_split
from sparsecache.kernels.page_selection import PageSelection, positions_of_pages
from sparsecache.kernels.quantisation import QuantisedStore
from sparsecache.kernels.rows import mask_of_first
from sparsecache.kernels.store_quantised import append_quantised, compiled_sizes, num_quantised

_MIN_WORDS = 16  # with 16 channels, products of unpacked codes are wrong (Triton 3.6, H200); 16 words are 32 or more
_TOTALS_PER_WARP, _MAX_SPLITS = 2048, 192
_SPLIT_TOKENS = 128  # of a full list of pages: shorter splits take about as long, and more must be merged
_PROGRAMS = {2: 12, 4: 8}  # by bits: programs of one warp per multiprocessor (H200, docs/dev/experiments.md)
_DEQUANTISED = {"BLOCK_T": 16, "BLOCK_N": 8, "SLOTS": 1, "TILES": 1, "num_stages": 3}
_WARPS_DEQUANTISED = 8  # per multiprocessor: what its registers allow
_MIN_TILE = 16  # tokens: the least that a tensor core product of their codes takes
_PACKED_BITS = {torch.float16: (2, 4, 8), torch.bfloat16: (2, 4)}  # codes that fit into a mantissa


def attend_quantised(q: Tensor, k: Tensor, v: Tensor, store: QuantisedStore, lengths: Tensor, slots: Tensor) -> Tensor:
    """Append one token to each slot and attend over the slot's past tokens and the new one: [B, H, 1, D].

    q: [B, H, 1, D]; k, v: [B, G, 1, D]; lengths: past tokens, int64, [slots] or per KV head [slots, G], not changed;
    slots: [B] int64, distinct. A full slot overwrites its last token.
    """
    if use_kernel(q):
        out = _launch(q, k, v, store, lengths, slots)
    else:
        past = store.past(lengths, slots)
        longest = int(past.max())
        keys, values = store.keys(lengths, slots, longest), store.values(lengths, slots, longest)
        out = attend_rows(q, k, v, keys, values, mask_of_first(past, longest))
    append_quantised(k, v, store, lengths, slots)
    return out


def attend_selected_quantised(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    store: QuantisedStore,
    lengths: Tensor,
    slots: Tensor,
    selected: Tensor,
    counts: Tensor,
) -> Tensor:
    """Attend over selected past tokens of each slot and the new token, which is not appended: [B, H, 1, D].

    selected: [B, G, N] int64; the first counts [B, G] (int64) of a KV head are valid and distinct. Other arguments:
    as in `attend_quantised`.
    """
    if use_kernel(q):
        return _launch(q, k, v, store, lengths, slots, selected, counts)
    mask = mask_of_first(counts, selected.shape[2])
    rows = selected.masked_fill(~mask, 0)
    return attend_rows(q, k, v, store.keys(lengths, slots, rows), store.values(lengths, slots, rows), mask)


def attends_to_pages(store: QuantisedStore, page: int) -> bool:
    """Return whether `attend_pages_quantised` takes pages of `page` tokens. If not, select tokens."""
    return use_kernel(store.key_codes) and _takes_pages(store, page)


def _takes_pages(store: QuantisedStore, page: int) -> bool:
    return _multiplies_codes(store) and page % _MIN_TILE == 0


def _multiplies_codes(store: QuantisedStore) -> bool:
    """Return whether kernels can multiply by codes that are not dequantised: in half precision, not on AMD GPUs.

    Such codes are subnormal numbers, which the matrix units of some AMD GPUs treat as zeros.
    """
    return store.key_tail.dtype != torch.float32 and torch.version.hip is None


def attend_pages_quantised(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    store: QuantisedStore,
    lengths: Tensor,
    slots: Tensor,
    selection: PageSelection,
) -> Tensor:
    """As `attend_selected_quantised`, over selected pages. lengths: [slots].

    Raises ValueError for pages that the kernel does not take (`attends_to_pages`).
    """
    if use_kernel(q):
        if not _takes_pages(store, selection.page):
            raise ValueError(
                f"Attention to pages of {selection.page} tokens in {q.dtype}: it takes multiples of {_MIN_TILE}, in "
                f"float16 or bfloat16, not on AMD GPUs. Select tokens instead."
            )
        return _launch(q, k, v, store, lengths, slots, selection.pages, selection.cuts, selection.page)
    selected = positions_of_pages(selection, store.past(lengths, slots)[:, 0])
    return attend_selected_quantised(q, k, v, store, lengths, slots, *selected)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    store: QuantisedStore,
    lengths: Tensor,
    slots: Tensor,
    selected: Tensor | None = None,
    counts: Tensor | None = None,
    page: int = 0,
) -> Tensor:
    """Launch the attention and merge its splits.

    selected, counts: tokens [B, G, N] and their number [B, G]. With a page size: of a PageSelection, pages and cuts.
    """
    batch, heads, _, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    block_w = next_power_of_2(store.key_codes.shape[3], _MIN_WORDS)
    block_c = next_power_of_2(store.value_ranges.shape[4])
    on_codes = (selected is None or page > 0) and _multiplies_codes(store)
    if on_codes:
        options, programs = _options_on_codes(store, group, block_w, block_c)
        if page:
            tile = math.gcd(page, options["BLOCK_T"], store.group)
            options = {**options, "BLOCK_T": tile, "TILES": options["TILES"] * options["BLOCK_T"] // tile}
    else:
        totals = max(16, next_power_of_2(group)) * 16 // store.bits * block_w
        warps = 4 if q.dtype == torch.float32 else max(1, totals // _TOTALS_PER_WARP)
        options, programs = {**_DEQUANTISED, "num_warps": warps}, max(2, _WARPS_DEQUANTISED // warps)
    num_splits = min(_MAX_SPLITS * batch, (2 if INTERPRETED else programs) * num_sms(q.device) // kv_heads)
    num_splits, tail_pages = max(batch, num_splits), 0
    if selected is not None and page:  # the full-precision tail of a sequence has a split of its own
        needed = 1 + -(-selected.shape[2] * page // _SPLIT_TOKENS)  # by one sequence
        num_splits = max(2 * batch, min(num_splits, needed * batch))
        tail_pages = next_power_of_2(-(-(store.residual + store.group) // page) + 1)  # the most that hold it
    packed = not INTERPRETED and torch.version.hip is None and store.bits in _PACKED_BITS.get(q.dtype, ())
    partial_out = torch.empty((heads, num_splits, head_dim), device=q.device, dtype=torch.float32)
    softmax_stats = torch.empty((2, heads, num_splits), device=q.device, dtype=torch.float32)  # maxima, sums
    split_ranges = torch.empty((batch, kv_heads, 2), device=q.device, dtype=torch.int32)  # first split, how many
    out = torch.empty((batch, heads, 1, head_dim), device=q.device, dtype=q.dtype)
    lengths = lengths.contiguous()
    # Unused pointer arguments need a tensor; `lengths` takes their place.
    indices = lengths if selected is None else selected.contiguous()
    _attend_kernel[(kv_heads, num_splits)](
        q, q.stride(0), q.stride(1), k, v, k.stride(0), k.stride(1), store.key_codes, store.key_ranges,
        store.value_codes, store.value_ranges, store.key_tail, store.value_tail, lengths, slots, indices,
        lengths if counts is None else counts.contiguous(), partial_out, softmax_stats, split_ranges,
        1 / math.sqrt(head_dim), batch, num_splits, store.capacity, store.key_codes.shape[2], store.residual,
        heads * num_splits, 0 if selected is None else selected.shape[2],
        SELECTED=selected is not None and page == 0, PAGE=page, ON_CODES=on_codes, PACKED=packed,
        PER_HEAD=lengths.dim() == 2, GROUP=group, BLOCK_R=max(16, next_power_of_2(group)),
        BLOCK_B=next_power_of_2(batch), BLOCK_W=block_w, BLOCK_C=block_c, BLOCK_P=tail_pages, INTERPRETED=INTERPRETED,
        **options, **compiled_sizes(store), **pdl_options(),
    )  # fmt: skip
    merge_kernel[(batch, heads)](
        partial_out, softmax_stats, split_ranges, out, num_splits, head_dim, heads * num_splits,
        GROUP=group, BATCHED=batch > 1, BLOCK_S=min(64, next_power_of_2(-(-num_splits // batch))),
        BLOCK_D=next_power_of_2(head_dim, 16), num_warps=2, **pdl_options(),
    )  # fmt: skip
    return out


def _options_on_codes(store: QuantisedStore, group: int, block_w: int, block_c: int) -> tuple[dict[str, int], int]:
    """Return the sizes and launch options of attention on codes, and its programs per multiprocessor.

    A program is one warp if its totals fit, so that nothing waits at barriers. The programs of a multiprocessor run at
    the same time: their number is what registers and shared memory allow.
    """
    queries = next_power_of_2(group)
    slots = block_c
    if store.key_codes.shape[3] == block_w:  # a plane is whole value groups, or a value group is whole planes
        slots = min(block_c, max(1, 8 // queries, block_w // store.group))
    columns = max(8, queries * slots)
    totals = columns * block_w * 16 // store.bits
    options = {"BLOCK_T": 32, "BLOCK_N": columns, "SLOTS": slots, "TILES": 1, "num_stages": 2}
    options["num_warps"] = max(1, totals // _TOTALS_PER_WARP)
    programs = max(1, 8 // options["num_warps"])
    if store.bits in _PROGRAMS and totals <= _TOTALS_PER_WARP // 2:
        options["TILES"], programs = 2, _PROGRAMS[store.bits]
        options["maxnreg"] = min(255, 65536 // (32 * programs) // 8 * 8)  # registers of a thread
    return options, programs


@triton.jit
def _accumulate(q_block, key, value, mask, scale, maximum, weight_sum, total):  # type: ignore[no-untyped-def]
    """Add a tile of keys and values [T, D] to a running softmax: maximum [R], sum of weights [R], total [R, D]."""
    scores = tl.dot(q_block, tl.trans(key), input_precision="ieee") * scale
    scores = tl.where(mask[None, :], scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # no token may count
    weights, rescale = tl.exp2(scores - base[:, None]), tl.exp2(maximum - base)
    weight_sum = weight_sum * rescale + tl.sum(weights, axis=1)
    total = tl.dot(weights.to(value.dtype), value, total * rescale[:, None], input_precision="ieee")
    return new_maximum, weight_sum, total


@triton.jit(do_not_specialize=["batch", "num_splits", "capacity", "code_rows", "residual", "stats_size", "width"])
def _attend_kernel(  # type: ignore[no-untyped-def]
    q, q_row_stride, q_head_stride, new_key, new_value, new_row_stride, new_head_stride, key_codes, key_ranges,
    value_codes, value_ranges, key_tail, value_tail, lengths, slots, indices, counts_ptr, partial_out, softmax_stats,
    split_ranges, scale, batch, num_splits, capacity, code_rows, residual, stats_size, width,
    SELECTED: tl.constexpr, PAGE: tl.constexpr, ON_CODES: tl.constexpr, PACKED: tl.constexpr, PER_HEAD: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
    BITS: tl.constexpr, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, WORDS: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, SLOTS: tl.constexpr, TILES: tl.constexpr,
    INTERPRETED: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Attend to one split for the query heads of a KV head. The last split takes the new token.

    ON_CODES: quantised tokens are not dequantised. PACKED: of `attend_dequantised`. BLOCK_P: the most pages that hold
    tokens of the full-precision tail. Exponents are of base 2.
    """
    pdl_wait(USE_PDL)
    kv, kv_heads, program, rows = tl.program_id(0), tl.num_programs(0), tl.program_id(1), tl.arange(0, BLOCK_B)
    in_batch = rows < batch
    row_slots = tl.load(slots + rows, mask=in_batch, other=0)
    at_length = row_slots * kv_heads + kv if PER_HEAD else row_slots
    all_past = tl.minimum(tl.load(lengths + at_length, mask=in_batch, other=0), capacity - 1).to(tl.int32)
    counts = all_past
    if SELECTED:
        counts = tl.load(counts_ptr + rows * kv_heads + kv, mask=in_batch, other=0).to(tl.int32)
    if PAGE > 0:  # places in the list of pages
        counts = tl.load(counts_ptr + (rows * kv_heads + kv) * 3, mask=in_batch, other=0) * PAGE
    # Lengths of splits are multiples of a group, so that a split of all tokens begins with a group of keys. A split of
    # pages has whole tiles. The last split takes no places, but the full-precision tokens of the listed pages.
    alignment: tl.constexpr = BLOCK_T if PAGE > 0 else TOKENS
    reserved: tl.constexpr = 1 if PAGE > 0 else 0
    row, slot, count, split, splits, length = place_split(
        program, counts, row_slots, in_batch, rows, batch, num_splits, BLOCK_B, alignment, reserved
    )
    if BLOCK_B > 1:
        if row >= batch:
            return
        if split == 0:
            split_range = split_ranges + (row * kv_heads + kv) * 2
            tl.store(split_range, program)
            tl.store(split_range + 1, splits)
    past = tl.sum(tl.where(rows == row, all_past, 0))
    num_coded = num_quantised(past, residual, TOKENS)
    block_d: tl.constexpr = 16 // BITS * BLOCK_W
    query, column = tl.arange(0, BLOCK_R), tl.arange(0, block_d)
    channel, in_head = column, column < HEAD_DIM
    if WORDS != BLOCK_W:  # channels are in the order of codes: by plane and word
        channel = column // BLOCK_W * WORDS + column % BLOCK_W
        in_head = (column % BLOCK_W < WORDS) & (channel < HEAD_DIM)
    q_mask = (query < GROUP)[:, None] & in_head[None, :]
    head = kv * GROUP + query
    q += row * q_row_stride + kv * GROUP * q_head_stride
    q_block = tl.load(q + query[:, None] * q_head_stride + channel[None, :], mask=q_mask, other=0.0)
    slot_head = slot * kv_heads + kv
    ring = residual + TOKENS
    key_tail += slot_head * ring * HEAD_DIM
    value_tail += slot_head * ring * HEAD_DIM
    key_codes += slot_head * code_rows * WORDS
    value_codes += slot_head * code_rows * WORDS
    key_ranges += slot_head * (code_rows // TOKENS) * 2 * HEAD_DIM
    value_ranges += slot_head * code_rows * 2 * VALUE_GROUPS
    indices += (row * kv_heads + kv) * width

    scale *= 1.4426950408889634  # log2(e)
    start, end = split * length, tl.minimum(split * length + length, count)
    cut_start, num_cut = 0, 0
    if PAGE > 0:
        cuts = counts_ptr + (row * kv_heads + kv) * 3
        cut_start, num_cut = tl.load(cuts + 1) * PAGE, tl.load(cuts + 2)
    if ON_CODES:
        coded_end = tl.minimum(end, num_coded)
        if PAGE > 0:  # without quantised tokens, codes are left from an earlier sequence, and may be of NaN
            coded_end = tl.where(num_coded > 0, end, start)
        maximum, weight_sum, total = attend_on_codes(
            q, q_head_stride, key_codes, key_ranges, value_codes, value_ranges, indices, cut_start, num_cut,
            num_coded.to(tl.int32), start.to(tl.int32), coded_end.to(tl.int32), scale, channel, in_head, PAGE, GROUP,
            BITS, TOKENS, HEAD_DIM, WORDS, VALUE_GROUPS, BLOCK_R, BLOCK_N, BLOCK_T, BLOCK_W, BLOCK_C, SLOTS, TILES,
            INTERPRETED,
        )  # fmt: skip
        if PAGE == 0:
            start = tl.maximum(start, num_coded)
        elif split == splits - 1:  # pages ascend, so those with tokens of the tail are last
            place = count // PAGE - 1 - tl.arange(0, BLOCK_P)
            page = tl.load(indices + place, mask=place >= 0, other=0)
            in_tail = (place >= 0) & (tl.minimum(page * PAGE + PAGE, past) > num_coded)
            start, end = count - PAGE * tl.sum(in_tail.to(tl.int32)), count
        else:
            start = end
    else:
        maximum, weight_sum, total, start = attend_dequantised(
            q, q_head_stride, key_codes, key_ranges, value_codes, value_ranges, indices, start.to(tl.int32),
            end.to(tl.int32), num_coded.to(tl.int32), scale, SELECTED, PACKED, GROUP, BITS, TOKENS, HEAD_DIM, WORDS,
            VALUE_GROUPS, BLOCK_R, BLOCK_T, BLOCK_W,
        )  # fmt: skip
    for first in tl.range(start, end, 16):  # those in full precision
        token = first + tl.arange(0, 16)
        mask = token < end
        if SELECTED:
            token = tl.load(indices + token, mask=mask, other=0).to(tl.int32)
            mask &= token >= num_coded
        if PAGE > 0:  # of one page, since PAGE is a multiple of 16
            token = position_of_place(indices, first, PAGE) + tl.arange(0, 16)
            mask &= (token >= num_coded) & (token < past)
            mask &= (token < cut_start) | (token >= cut_start + num_cut)
        at_tail = (token % ring)[:, None] * HEAD_DIM + channel[None, :]
        key = tl.load(key_tail + at_tail, mask=mask[:, None] & in_head[None, :], other=0.0)
        value = tl.load(value_tail + at_tail, mask=mask[:, None] & in_head[None, :], other=0.0)
        maximum, weight_sum, total = _accumulate(q_block, key, value, mask, scale, maximum, weight_sum, total)
    if split == splits - 1:
        at_new = row * new_row_stride + kv * new_head_stride + channel
        key = tl.load(new_key + at_new, mask=in_head, other=0.0).to(tl.float32)
        value = tl.load(new_value + at_new, mask=in_head, other=0.0).to(tl.float32)
        score = tl.sum(q_block.to(tl.float32) * key[None, :], axis=1) * scale
        new_maximum = tl.maximum(maximum, score)
        weight, rescale = tl.exp2(score - new_maximum), tl.exp2(maximum - new_maximum)
        maximum = new_maximum
        weight_sum = weight_sum * rescale + weight
        total = total * rescale[:, None] + weight[:, None] * value[None, :]

    pdl_launch(USE_PDL)
    target = head * num_splits + program
    tl.store(softmax_stats + target, maximum * 0.6931471805599453, mask=query < GROUP)  # the merge uses base e
    tl.store(softmax_stats + stats_size + target, weight_sum, mask=query < GROUP)
    tl.store(partial_out + target[:, None] * HEAD_DIM + channel[None, :], total, mask=q_mask)
