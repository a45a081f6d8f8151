"""Sum the attention that each prompt token receives, without an L x L tensor of scores."""

import math

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, tl, triton, use_kernel
from sparsecache.kernels.scores import scaled_scores

_BLOCK = 64  # queries per iteration of the reference
_BLOCK_M, _BLOCK_N, _WARPS = 64, 128, 4  # queries and keys per iteration
_NORMALIZER_BLOCK_M, _NORMALIZER_WARPS = 128, 8  # more queries per program read the keys from L2 less often
_FEW_QUERIES = 256  # with so few, the reference is as fast: the kernels do not fill the GPU
_MAX_ROW_BYTES = 512  # tiles of wider rows do not fit into shared memory


def attention_sums(q: Tensor, k: Tensor, first: int) -> Tensor:
    """Return the attention that each prompt token receives from queries `first` to the last: [G, L] float32.

    q: [H, L, D]; k: [G, L, D]. The sum is over queries, and over the query heads of a KV head.
    """
    kv_heads, length, head_dim = k.shape
    if use_kernel(q) and length - first > _FEW_QUERIES and head_dim * q.element_size() <= _MAX_ROW_BYTES:
        return _launch(q, k, first)
    sums = torch.zeros(kv_heads, length, device=k.device)
    for start in range(first, length, _BLOCK):
        end = min(start + _BLOCK, length)
        scores = scaled_scores(q[:, start:end], k[:, :end], head_dim)  # [H, block, end]
        is_later = torch.ones(end - start, end, device=k.device, dtype=torch.bool).triu(start + 1)
        received = scores.masked_fill_(is_later, -torch.inf).softmax(-1).sum(1)  # [H, end]
        sums[:, :end] += received.view(kv_heads, -1, end).sum(1)
    return sums


def _launch(q: Tensor, k: Tensor, first: int) -> Tensor:
    """Launch the kernels of `attention_sums`."""
    heads, length, head_dim = q.shape
    kv_heads = k.shape[0]
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    normalizers = torch.empty((heads, length), device=q.device, dtype=torch.float32)
    sums = torch.empty((kv_heads, length), device=q.device, dtype=torch.float32)
    inputs = (q, q.stride(0), q.stride(1), k, k.stride(0), k.stride(1), normalizers)
    scale = math.log2(math.e) / math.sqrt(head_dim)  # scores are exponents of 2
    sizes = {
        "GROUP": heads // kv_heads, "BLOCK_N": _BLOCK_N, "BLOCK_D": next_power_of_2(head_dim, 16), "num_stages": 2,
    }  # fmt: skip
    _normalizer_kernel[(-(-(length - first) // _NORMALIZER_BLOCK_M), heads)](
        *inputs, scale, first, length, head_dim, BLOCK_M=_NORMALIZER_BLOCK_M, num_warps=_NORMALIZER_WARPS, **sizes,
    )  # fmt: skip
    _sum_kernel[(-(-length // _BLOCK_N), kv_heads)](
        *inputs, sums, scale, first, length, head_dim, BLOCK_M=_BLOCK_M, num_warps=_WARPS, **sizes,
    )  # fmt: skip
    return sums


@triton.jit
def _causal_scores(  # type: ignore[no-untyped-def]
    q_block, k_block, row, column, scale, MASKED: tl.constexpr
):  # fmt: skip
    """Return scores [BLOCK_M, BLOCK_N]. MASKED: set those of tokens later than the query to -inf."""
    scores = tl.dot(q_block, k_block, input_precision="ieee") * scale
    if MASKED:
        scores = tl.where(column[None, :] <= row[:, None], scores, float("-inf"))
    return scores


@triton.jit(do_not_specialize=["first", "length"])
def _normalizer_kernel(  # type: ignore[no-untyped-def]
    q, q_head_stride, q_stride, k, k_head_stride, k_stride, normalizers, scale, first, length, head_dim,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the logarithm to base 2 of the softmax's denominator for BLOCK_M queries of a head."""
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
            scores = _causal_scores(q_block, k_block, row, column, scale, masked)
            new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
            total = total * tl.exp2(maximum - new_maximum) + tl.sum(tl.exp2(scores - new_maximum[:, None]), axis=1)
            maximum = new_maximum
    tl.store(normalizers + head * length + row, maximum + tl.log2(total), mask=row < length)


@triton.jit(do_not_specialize=["first", "length"])
def _sum_kernel(  # type: ignore[no-untyped-def]
    q, q_head_stride, q_stride, k, k_head_stride, k_stride, normalizers, sums, scale, first, length, head_dim,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the attention that BLOCK_N tokens of a KV head receive from all queries of its query heads."""
    kv, channel = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_D)
    begin = tl.program_id(0) * BLOCK_N  # programs with the most queries start first
    column = begin + tl.arange(0, BLOCK_N)
    in_head = channel < head_dim
    k_ptr = k + kv * k_head_stride + column[None, :] * k_stride + channel[:, None]
    k_block = tl.load(k_ptr, mask=(column < length)[None, :] & in_head[:, None], other=0.0)
    received = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)  # added over the queries after the loops
    seen_by_all = tl.maximum(first, tl.cdiv(tl.maximum(begin + BLOCK_N - 1 - first, 0), BLOCK_M) * BLOCK_M + first)
    for group_head in range(GROUP):
        head = kv * GROUP + group_head
        for masked in tl.static_range(2):
            first_row = first + tl.maximum(begin - first, 0) // BLOCK_M * BLOCK_M if masked else seen_by_all
            for start in tl.range(first_row, tl.minimum(seen_by_all, length) if masked else length, BLOCK_M):
                row = start + tl.arange(0, BLOCK_M)
                q_ptr = q + head * q_head_stride + row[:, None] * q_stride + channel[None, :]
                q_block = tl.load(q_ptr, mask=(row < length)[:, None] & in_head[None, :], other=0.0)
                normalizer = tl.load(normalizers + head * length + row, mask=row < length, other=float("inf"))
                scores = _causal_scores(q_block, k_block, row, column, scale, masked)
                weights = tl.exp2(scores - normalizer[:, None])  # 0 beyond the last query
                received += weights
    tl.store(sums + kv * length + column, tl.sum(received, axis=0), mask=column < length)
