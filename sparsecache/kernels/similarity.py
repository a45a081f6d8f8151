"""Sum each prompt token's cosine similarities with the others, without an L x L tensor.

Two tokens are similar if the cosine similarity of their keys is above a threshold. A token exempts the latest other
token that is similar to it: their similarity does not count in the sum of the exempted token.

The sum over all others follows from the sum of all normalised keys. Only the search for similar tokens compares pairs,
in two passes, and most pairs at most once.

1. Each block of tokens is compared with itself and later blocks, from the last one back, until each token of the block
   has found a later similar token. A pair that is found also makes the earlier token a candidate of the later one.
2. Tokens without a later similar token are compared with earlier blocks, from the nearest one back, until each has
   found a similar token. Blocks of which pass 1 compared all tokens with them are left out.

Results do not depend on the order in which programs run. Candidates are integers whose maximum is taken. Sums that
several programs add to are integers in fixed point.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparsecache.kernels._triton import has_large_shared_memory, next_power_of_2, tl, triton, use_kernel

_BLOCK = 64  # tokens per iteration of the reference
_CHUNK = 4  # iterations between two checks whether all tokens are done; loads are pipelined within a chunk
_WINDOW = tl.constexpr(256)  # blocks that are searched at once for the next one to compare
_SUMMED = tl.constexpr(64)  # blocks whose normalised keys are added at once
_ONE = 1 << 32  # 1 in fixed point; a sum of up to 2^31 similarities fits into int64


class Similarities(NamedTuple):
    """Of each token, [G, L] each.

    sums: float32, its similarities with all other tokens, except those that exempt it. exempted: int64, the token that
    it exempts, or -1. similarity: float32, its similarity to that token, or 0.
    """

    sums: Tensor
    exempted: Tensor
    similarity: Tensor


def similarity_sums(keys: Tensor, threshold: float, out: Similarities | None = None) -> Similarities:
    """Return sums of cosine similarities, exempted tokens, and the similarities to these.

    keys: [G, L, D], finite; threshold: above 0. A token exempts the latest other token whose similarity to it is above
    `threshold`. out: the results are written there; its tensors have equal strides, and rows are contiguous.
    """
    if use_kernel(keys):
        return _launch(keys, threshold, out)
    unit = normalize(keys.float(), dim=2)
    rows = torch.arange(keys.shape[1], device=keys.device)
    parts = []
    for block, at in zip(torch.split(unit, _BLOCK, 1), torch.split(rows, _BLOCK), strict=True):
        found = (block @ unit.mT).masked_fill_(rows == at[:, None], 0)  # [G, block, L]
        latest = rows.expand_as(found).masked_fill(found <= threshold, -1).amax(2, keepdim=True)
        similarity = found.gather(2, latest.clamp(min=0)).masked_fill(latest < 0, 0)
        parts.append((found.sum(2), latest[..., 0], similarity[..., 0]))
    sums, latest, similarity = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    results = Similarities(sums.scatter_add(1, latest.clamp(min=0), -similarity), latest, similarity)
    if out is None:
        return results
    for target, result in zip(out, results, strict=True):
        target.copy_(result)
    return out


def _launch(keys: Tensor, threshold: float, out: Similarities | None) -> Similarities:
    kv_heads, length, head_dim = keys.shape
    keys = keys if keys.stride(2) == 1 else keys.contiguous()
    block_d = next_power_of_2(head_dim, 16)
    fits = block_d * keys.element_size() <= 256 and has_large_shared_memory(keys.device)
    block, warps, stages = (128, 4, 2) if fits else (64, 4, 1)
    blocks = -(-length // block)

    def empty(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((kv_heads, *size), device=keys.device, dtype=dtype)

    norms, partial = empty(blocks * block, dtype=torch.float32), empty(blocks, block_d, dtype=torch.float32)
    min_norms = empty(blocks, dtype=torch.float32)
    later, earlier, compared = (empty(size, dtype=torch.int32) for size in (length, length, blocks))
    fixed = empty(length, dtype=torch.int64)
    if out is None:
        sums, similarity = (empty(length, dtype=torch.float32) for _ in range(2))
        out = Similarities(sums, empty(length, dtype=torch.int64), similarity)
    inputs, grid = (keys, keys.stride(0), keys.stride(1)), (kv_heads, blocks)
    sizes = {"HEAD_DIM": head_dim, "BLOCK": block, "BLOCK_D": block_d, "num_warps": warps}
    _norm_kernel[grid](*inputs, norms, min_norms, partial, earlier, fixed, length, **sizes)
    for is_second in (False, True):
        _search_kernel[grid](
            *inputs, norms, min_norms, later, earlier, compared, threshold, length,
            SECOND=is_second, CHUNK=_CHUNK, num_stages=stages, **sizes,
        )  # fmt: skip
    _sum_kernel[grid](
        *inputs, norms, partial, later, earlier, out.exempted, out.similarity, out.exempted.stride(0), fixed, length,
        ONE=_ONE, **sizes,
    )  # fmt: skip
    torch.mul(fixed, 1 / _ONE, out=out.sums)
    return out


@triton.jit
def _load_keys(  # type: ignore[no-untyped-def]
    base, stride, row, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Return the keys of rows [BLOCK, BLOCK_D], 0 where a mask is False."""
    channel = tl.arange(0, BLOCK_D)
    ptr = base + row[:, None] * stride + channel[None, :]
    if HEAD_DIM == BLOCK_D:
        return tl.load(ptr, mask=mask[:, None], other=0.0)
    return tl.load(ptr, mask=mask[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)


@triton.jit(do_not_specialize=["length"])
def _norm_kernel(  # type: ignore[no-untyped-def]
    keys, head_stride, stride, norms, min_norms, partial, earlier, fixed, length,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the norms of BLOCK keys and the sum of the normalised keys; initialise `earlier` and `fixed`."""
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = row < length
    key = _load_keys(keys + head * head_stride, stride, row.to(tl.int64), mask, HEAD_DIM, BLOCK_D).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(key * key, axis=1)), 1e-12)  # as torch's normalize
    norm = tl.where(mask, norm, 1e18)  # no token is similar to those beyond the last one
    place = head * tl.num_programs(1) + tl.program_id(1)
    tl.store(norms + place * BLOCK + tl.arange(0, BLOCK), norm)
    tl.store(min_norms + place, tl.min(norm, axis=0))
    tl.store(partial + place * BLOCK_D + tl.arange(0, BLOCK_D), tl.sum(key / norm[:, None], axis=0))
    tl.store(earlier + head * length + row, tl.full((BLOCK,), -1, tl.int32), mask=mask)
    tl.store(fixed + head * length + row, tl.zeros((BLOCK,), dtype=tl.int64), mask=mask)


@triton.jit
def _next_uncompared(compared, left, token):  # type: ignore[no-untyped-def]
    """Return 1 + the last of the first `left` blocks that the first pass did not compare with `token`; 0 if none."""
    found = 0
    for first in tl.range(0, left, _WINDOW):
        block = first + tl.arange(0, _WINDOW)
        since = tl.load(compared + block, mask=block < left, other=0)
        found = tl.maximum(found, tl.max(tl.where(since > token, block + 1, 0), axis=0))
    return found


@triton.jit(do_not_specialize=["length"])
def _search_kernel(  # type: ignore[no-untyped-def]
    keys, head_stride, stride, norms, min_norms, later, earlier, compared, threshold, length,
    HEAD_DIM: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Find the latest similar token of each of BLOCK tokens: among later ones, or if SECOND among earlier ones.

    later, earlier: [G, L] int32, the latest similar token after and before each token, or -1. compared: [G, blocks]
    int32; the first pass compared all tokens of a block with all tokens from this one on.
    """
    head, offset, blocks = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.num_programs(1)
    block = blocks - 1 - tl.program_id(1) if SECOND else tl.program_id(1)  # programs with the most pairs start first
    base, later, earlier = keys + head * head_stride, later + head * length, earlier + head * length
    norms, min_norms, compared = norms + head * blocks * BLOCK, min_norms + head * blocks, compared + head * blocks
    row = block * BLOCK + offset
    mask = row < length
    done = 0x7FFFFFFF
    if SECOND:
        has_later = tl.load(later + row, mask=mask, other=0) >= 0
        found = tl.where(has_later, done, tl.load(earlier + row, mask=mask, other=done))
        left, last = block + 1, 0  # the blocks from `last` to before `left` are to be compared
    else:
        found = tl.where(mask, -1, done)
        left, last = blocks, block
    row_keys = _load_keys(base, stride, row.to(tl.int64), mask, HEAD_DIM, BLOCK_D)
    min_product = threshold * tl.load(norms + row)
    while left > last:
        if SECOND:
            left = _next_uncompared(compared, left, block * BLOCK)
        is_open = tl.min(found, axis=0) < left * BLOCK
        first = tl.where(is_open, tl.maximum(left - CHUNK, last), left)
        for step in tl.range(0, left - first):
            start = (left - 1 - step) * BLOCK
            min_norm = tl.load(min_norms + left - 1 - step)
            tile = base + start.to(tl.int64) * stride
            column_keys = _load_keys(tile, stride, offset, offset < length - start, HEAD_DIM, BLOCK_D)
            product = tl.dot(row_keys, column_keys.T, input_precision="ieee")
            # A token that found a similar one in a later block is done. 1e18 is above any norm.
            min_open = tl.where(found < start + BLOCK, min_product, 1e18)
            # Most blocks hold no similar token. The smallest norm of the block shows that without a norm per column.
            # 0.999 is a margin for rounding: it only lets more blocks through to the exact test below.
            if tl.max(tl.max(product, axis=1) - min_open * min_norm * 0.999, axis=0) > 0:
                column = start + offset
                is_similar = product > min_open[:, None] * tl.load(norms + column)[None, :]
                if SECOND:
                    is_similar = is_similar & (column[None, :] < row[:, None])
                else:
                    is_similar = is_similar & (column[None, :] > row[:, None])
                best = tl.max(tl.where(is_similar, column[None, :], -1), axis=1)
                found = tl.maximum(found, best)
                if not SECOND:
                    if tl.max(best, axis=0) >= 0:
                        candidate = tl.max(tl.where(is_similar, row[:, None], -1), axis=0)
                        tl.atomic_max(earlier + column, candidate, mask=candidate >= 0, sem="relaxed")
        left = tl.where(is_open, first, last)
    if SECOND:
        tl.store(earlier + row, found, mask=mask & (found != done))
    else:
        tl.store(later + row, found, mask=mask)
        since = tl.where(mask & (found >= 0), found // BLOCK * BLOCK, 0)
        tl.store(compared + block, tl.max(since, axis=0))


# The pointers to the rows of a slot are aligned for some slots only; this too would compile the kernel again.
@triton.jit(do_not_specialize=["length", "out_stride", "exempted", "similarity"])
def _sum_kernel(  # type: ignore[no-untyped-def]
    keys, head_stride, stride, norms, partial, later, earlier, exempted, similarity, out_stride, fixed, length,
    HEAD_DIM: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the similarities of BLOCK tokens to their sums, and subtract from others' sums what these tokens exempt.

    partial: [G, blocks, BLOCK_D], the sum of each block's normalised keys. out_stride: of the heads of `exempted` and
    `similarity`.
    """
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask, at = row < length, head * length + row
    base, norms = keys + head * head_stride, norms + head * tl.num_programs(1) * BLOCK
    key = _load_keys(base, stride, row.to(tl.int64), mask, HEAD_DIM, BLOCK_D).to(tl.float32)
    unit = key / tl.load(norms + row)[:, None]
    all_keys = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in tl.range(0, tl.num_programs(1), _SUMMED):
        block = first + tl.arange(0, _SUMMED)[:, None]
        part = partial + (head * tl.num_programs(1) + block) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        all_keys += tl.sum(tl.load(part, mask=block < tl.num_programs(1), other=0.0), axis=0)
    sums = tl.sum(unit * (all_keys[None, :] - unit), axis=1)
    tl.atomic_add(fixed + at, (sums.to(tl.float64) * ONE).to(tl.int64), mask=mask, sem="relaxed")
    found = tl.load(later + at, mask=mask, other=-1)
    found = tl.where(found >= 0, found, tl.load(earlier + at, mask=mask, other=-1))
    is_exempted, target = found >= 0, tl.maximum(found, 0)
    key = _load_keys(base, stride, target.to(tl.int64), is_exempted, HEAD_DIM, BLOCK_D).to(tl.float32)
    cosine = tl.sum(unit * (key / tl.load(norms + target)[:, None]), axis=1)
    tl.store(exempted + head * out_stride + row, found.to(tl.int64), mask=mask)
    tl.store(similarity + head * out_stride + row, cosine, mask=mask)
    amount = (cosine.to(tl.float64) * ONE).to(tl.int64)
    tl.atomic_add(fixed + head * length + target, -amount, mask=is_exempted, sem="relaxed")
