"""The highest and lowest scores of past tokens, which `threshold_select` needs with scores made by torch operations."""

import torch
from torch import Tensor

from sparsecache.kernels._triton import pdl_options, pdl_wait, saturating_programs, tl, triton
from sparsecache.kernels.threshold import Scores, split_range

_BLOCK_T = 1024  # tokens per iteration
_SPLIT_TOKENS, _MAX_SPLITS = 1024, 64
_ALIGNMENT = 16


def with_extremes(scores: Tensor, seq_lens: Tensor, slots: Tensor) -> Scores:
    """Return scores [B, G, T] float32 as `threshold_select` takes them on a GPU.

    Scores beyond a slot's past tokens may be anything. seq_lens: [slots] int64; slots: [B] int64.
    """
    batch, kv_heads, tokens = scores.shape
    rows, stride = batch * kv_heads, -(-tokens // _ALIGNMENT) * _ALIGNMENT
    splits = max(1, min(_MAX_SPLITS, saturating_programs(scores.device) // rows, tokens // _SPLIT_TOKENS))
    aligned = torch.empty((batch, kv_heads, 1, stride), device=scores.device, dtype=torch.float32)
    extremes = torch.empty((2, batch, kv_heads, splits), device=scores.device, dtype=torch.float32)
    _extremes_kernel[(rows, splits)](
        scores, *scores.stride(), seq_lens, slots, aligned, extremes, kv_heads, stride, tokens,
        SPLITS=splits, BLOCK_T=_BLOCK_T, num_warps=4, **pdl_options(),
    )  # fmt: skip
    return Scores(aligned, extremes)


@triton.jit(do_not_specialize=["tokens"])
def _extremes_kernel(  # type: ignore[no-untyped-def]
    scores, row_stride, head_stride, token_stride, seq_lens, slots, aligned, extremes, kv_heads, stride, tokens,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Copy the scores of a split, and find their extremes."""
    pdl_wait(USE_PDL)
    owner, row, kv = tl.program_id(0), tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    count = tl.minimum(tl.load(seq_lens + tl.load(slots + row)), tokens).to(tl.int32)
    highest = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
    lowest = tl.full((BLOCK_T,), float("inf"), dtype=tl.float32)
    source = scores + row.to(tl.int64) * row_stride + kv * head_stride
    start, end = split_range(count, tl.program_id(1), BLOCK_T, SPLITS)
    for first in tl.range(start, end, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        score = tl.load(source + token * token_stride, mask=token < end, other=0.0)
        tl.store(aligned + owner.to(tl.int64) * stride + token, score, mask=token < end)
        highest = tl.maximum(highest, tl.where(token < end, score, float("-inf")))
        lowest = tl.minimum(lowest, tl.where(token < end, score, float("inf")))
    target = extremes + owner * SPLITS + tl.program_id(1)
    tl.store(target, tl.max(highest, axis=0))
    tl.store(target + tl.num_programs(0) * SPLITS, tl.min(lowest, axis=0))
