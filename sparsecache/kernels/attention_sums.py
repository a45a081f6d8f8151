"""Sum the attention that each prompt token receives, without an L x L tensor of scores."""

import math

import torch
from torch import Tensor

from sparsecache.kernels._triton import has_large_shared_memory, next_power_of_2, tl, triton, use_kernel
from sparsecache.kernels.scores import scaled_scores

_BLOCK = 64  # queries per iteration of the reference
_LOGSUMEXP_BLOCK_M, _LOGSUMEXP_BLOCK_N, _LOGSUMEXP_WARPS = 128, 128, 8  # queries per program, keys per iteration
_BLOCK_M = 64  # queries per iteration of the sums
_MAX_ROW_BYTES = 512  # tiles of wider rows do not fit into shared memory
_LOG2_E = math.log2(math.e)


def attention_sums(q: Tensor, k: Tensor, first: int, logsumexp: Tensor | None = None) -> Tensor:
    """Return the attention that each prompt token receives from queries `first` to the last: [G, L] float32.

    q: [H, L, D]; k: [G, L, D]. The sum is over queries, and over the query heads of a KV head. logsumexp: [H, L]
    float32, the logarithm of each query's sum of exp(score) over the tokens up to its own; computed if None.
    """
    kv_heads, length, head_dim = k.shape
    if use_kernel(q) and head_dim * q.element_size() <= _MAX_ROW_BYTES:
        return _launch(q, k, first, logsumexp)
    sums = torch.zeros(kv_heads, length, device=k.device)
    for start in range(first, length, _BLOCK):
        end = min(start + _BLOCK, length)
        scores = scaled_scores(q[:, start:end], k[:, :end], head_dim)  # [H, block, end]
        is_later = torch.ones(end - start, end - start, device=k.device, dtype=torch.bool).triu(1)
        scores[:, :, start:].masked_fill_(is_later, -torch.inf)  # tokens before the block are seen by all its queries
        weights = scores.softmax(-1) if logsumexp is None else (scores - logsumexp[:, start:end, None]).exp()
        sums[:, :end].add_(weights.sum(1).view(kv_heads, -1, end).sum(1))  # `+=` would copy the result to itself
    return sums


def _launch(q: Tensor, k: Tensor, first: int, logsumexp: Tensor | None) -> Tensor:
    """Return `attention_sums` by its kernels."""
    heads, length, head_dim = q.shape
    kv_heads = k.shape[0]
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    # Rows of a multiple of 64 values, so that loads of a tile are aligned.
    logsumexp2 = torch.empty((heads, -(-length // _BLOCK_M) * _BLOCK_M), device=q.device, dtype=torch.float32)
    sums = torch.empty((heads, length), device=q.device, dtype=torch.float32)
    scale = _LOG2_E / math.sqrt(head_dim)  # scores are exponents of 2, and logsumexp2 has base 2
    inputs = (q, q.stride(0), q.stride(1), k, k.stride(0), k.stride(1), logsumexp2, logsumexp2.stride(0))
    sizes = {"GROUP": heads // kv_heads, "BLOCK_D": next_power_of_2(head_dim, 16)}
    if logsumexp is None:
        _normalizer_kernel[(-(-(length - first) // _LOGSUMEXP_BLOCK_M), heads)](
            *inputs, scale, first, length, head_dim, BLOCK_M=_LOGSUMEXP_BLOCK_M, BLOCK_N=_LOGSUMEXP_BLOCK_N,
            num_warps=_LOGSUMEXP_WARPS, num_stages=2, **sizes,
        )  # fmt: skip
    else:
        torch.mul(logsumexp, _LOG2_E, out=logsumexp2[:, :length])
    tile = _sum_tile(q)
    _sum_kernel[(heads, -(-length // tile["BLOCK_N"]))](
        *inputs, sums, scale, first, length, head_dim, BLOCK_M=_BLOCK_M, **tile, **sizes
    )
    return sums.view(kv_heads, -1, length).sum(1)


def _sum_tile(q: Tensor) -> dict[str, int]:
    """Return the keys per program of `_sum_kernel`, and its launch options."""
    half, row_nbytes = q.element_size() == 2, q.shape[2] * q.element_size()
    if half and row_nbytes <= 256 and has_large_shared_memory(q.device):
        # With at most 128 registers per thread, two programs share a multiprocessor.
        return {"BLOCK_N": 256, "num_warps": 8, "STAGES": 3, "maxnreg": 128}
    return {"BLOCK_N": 128, "num_warps": 4 if half else 8, "STAGES": 2}


@triton.jit(do_not_specialize=["first", "length"])
def _normalizer_kernel(  # type: ignore[no-untyped-def]
    q, q_head_stride, q_stride, k, k_head_stride, k_stride, normalizers, normalizer_stride, scale, first, length,
    head_dim, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the base-2 log-sum-exp of the scores, the normalizer of a softmax, of BLOCK_M queries of a head."""
    head, channel = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_D)
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # programs with the most tokens start first
    row = first + block * BLOCK_M + tl.arange(0, BLOCK_M)
    in_head = channel < head_dim
    q_ptr = q + head * q_head_stride + row[:, None] * q_stride + channel[None, :]
    q_block = tl.load(q_ptr, mask=(row < length)[:, None] & in_head[None, :], other=0.0)
    keys = k + head // GROUP * k_head_stride
    maximum = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    end = tl.minimum(first + block * BLOCK_M + BLOCK_M, length)
    earlier = (first + block * BLOCK_M) // BLOCK_N * BLOCK_N  # blocks of tokens that all queries see need no mask
    for masked in tl.static_range(2):
        for start in tl.range(earlier if masked else 0, end if masked else earlier, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            k_ptr = keys + column[None, :] * k_stride + channel[:, None]
            k_block = tl.load(k_ptr, mask=((column < length) | (not masked))[None, :] & in_head[:, None], other=0.0)
            scores = tl.dot(q_block, k_block, input_precision="ieee") * scale
            if masked:
                scores = tl.where(column[None, :] <= row[:, None], scores, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
            total = total * tl.exp2(maximum - new_maximum) + tl.sum(tl.exp2(scores - new_maximum[:, None]), axis=1)
            maximum = new_maximum
    tl.store(normalizers + head * normalizer_stride + row, maximum + tl.log2(total), mask=row < length)


@triton.jit(do_not_specialize=["first", "length"])
def _sum_kernel(  # type: ignore[no-untyped-def]
    q, q_head_stride, q_stride, k, k_head_stride, k_stride, normalizers, normalizer_stride, sums, scale, first, length,
    head_dim, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Store the attention that BLOCK_N tokens receive from the queries of a head, from `first` on."""
    head, channel = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    begin = tl.program_id(1) * BLOCK_N  # programs with the most queries start first
    column = begin + tl.arange(0, BLOCK_N)
    in_head = channel < head_dim
    k_ptr = k + head // GROUP * k_head_stride + column[:, None] * k_stride + channel[None, :]
    k_block = tl.load(k_ptr, mask=(column < length)[:, None] & in_head[None, :], other=0.0)
    queries = q + head * q_head_stride
    offsets = tl.arange(0, BLOCK_M)[None, :] * q_stride + channel[:, None]
    normalizers += head * normalizer_stride
    received = tl.zeros((BLOCK_N,), dtype=tl.float32)
    # Tiles of queries, by position: those on the diagonal, then those after all keys. The last one may be incomplete.
    num_tiles, num_complete = tl.cdiv(length, BLOCK_M), length // BLOCK_M
    first_tile = tl.maximum(begin, first) // BLOCK_M
    first_after = tl.minimum(tl.cdiv(tl.maximum(begin + BLOCK_N - 1, first), BLOCK_M), num_tiles)
    num_diagonal = first_after - first_tile
    num_masked = num_diagonal + num_tiles - tl.maximum(num_complete, first_after)
    for masked in tl.static_range(2):
        # Stages of a loop, unlike those of a kernel, also pipeline loads that no product reads.
        for index in tl.range(
            0 if masked else first_after, num_masked if masked else num_complete, num_stages=1 if masked else STAGES
        ):
            tile = tl.where(index < num_diagonal, first_tile + index, num_complete) if masked else index
            row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            q_ptr = queries + (tile * BLOCK_M).to(tl.int64) * q_stride + offsets
            if masked:
                is_query = (row >= first) & (row < length)
                q_block = tl.load(q_ptr, mask=is_query[None, :] & in_head[:, None], other=0.0)
                normalizer = tl.load(normalizers + row, mask=is_query, other=float("inf"))  # a weight of 0
            else:
                q_block = tl.load(q_ptr, mask=in_head[:, None], other=0.0)
                normalizer = tl.load(normalizers + row)
            scores = tl.dot(k_block, q_block, input_precision="ieee")
            weights = tl.exp2(scores * scale - normalizer[None, :])
            if masked:
                weights = tl.where(column[:, None] <= row[None, :], weights, 0.0)
            received += tl.sum(weights, axis=1)
    tl.store(sums + head * length + column, received, mask=column < length)
