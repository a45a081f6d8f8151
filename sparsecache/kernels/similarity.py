"""Find each prompt token's latest similar token, by their keys, without an L x L tensor."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparsecache.kernels._triton import has_large_shared_memory, next_power_of_2, tl, triton, use_kernel

_BLOCK = 64  # tokens per iteration of the reference
_BLOCK_N = 128  # tokens per iteration of the kernel
_CHUNK = 8  # iterations between two checks of whether all tokens are done; loads are pipelined within a chunk


def latest_similar(keys: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the latest token similar to each token, or -1, and the two's cosine similarity, or 0.

    Two different tokens are similar if the cosine similarity of their keys is above `threshold`. keys: [G, L, D],
    finite; threshold: above 0. Returns [G, L] int64 and [G, L] float32.
    """
    kv_heads, length, head_dim = keys.shape
    if use_kernel(keys):
        keys = keys if keys.stride(2) == 1 else keys.contiguous()
        block_d = next_power_of_2(head_dim, 16)
        if block_d * keys.element_size() <= 256:
            block_m, warps, stages = 128, 8, 3 if has_large_shared_memory(keys.device) else 2
        else:
            block_m, warps, stages = 64, 4, 1
        norms = torch.linalg.vector_norm(keys, dim=2, dtype=torch.float32).clamp_(min=1e-12)
        latest = torch.empty((kv_heads, length), device=keys.device, dtype=torch.int64)
        similarity = torch.empty((kv_heads, length), device=keys.device, dtype=torch.float32)
        _latest_kernel[(-(-length // block_m), kv_heads)](
            keys, keys.stride(0), keys.stride(1), norms, latest, similarity, threshold, length, head_dim,
            BLOCK_M=block_m, BLOCK_N=_BLOCK_N, CHUNK=_CHUNK, BLOCK_D=block_d, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return latest, similarity
    unit = normalize(keys.float(), dim=2)
    rows = torch.arange(length, device=keys.device)
    parts = []
    for block, at in zip(torch.split(unit, _BLOCK, 1), torch.split(rows, _BLOCK), strict=True):
        found = (block @ unit.mT).masked_fill_(rows == at[:, None], 0)  # [G, block, L]
        latest = rows.expand_as(found).masked_fill(found <= threshold, -1).amax(2, keepdim=True)
        parts.append((latest[..., 0], found.gather(2, latest.clamp(min=0)).masked_fill(latest < 0, 0)[..., 0]))
    latest, similarity = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return latest, similarity


@triton.jit(do_not_specialize=["length"])
def _latest_kernel(  # type: ignore[no-untyped-def]
    keys, head_stride, stride, norms, latest, similarity, threshold, length, head_dim,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compare BLOCK_M tokens with all tokens, from the last one back, until each has a similar token."""
    head, channel = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_D)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_head = channel < head_dim
    base = keys + head * head_stride
    of_row = tl.load(
        base + row[:, None] * stride + channel[None, :], mask=(row < length)[:, None] & in_head[None, :], other=0.0
    )
    row_norm = tl.load(norms + head * length + row, mask=row < length, other=1.0)
    found = tl.where(row < length, -1, length)
    found_cosine = tl.zeros((BLOCK_M,), dtype=tl.float32)
    blocks = tl.cdiv(length, BLOCK_N)  # not compared yet
    while blocks > 0:
        count = tl.minimum(blocks, CHUNK)
        for step in tl.range(0, count):
            column = (blocks - 1 - step) * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = (column < length)[None, :] & in_head[:, None]
            of_column = tl.load(base + column[None, :] * stride + channel[:, None], mask=mask, other=0.0)
            column_norm = tl.load(norms + head * length + column, mask=column < length, other=1.0)
            product = tl.dot(of_row, of_column, input_precision="ieee")
            # Most blocks hold no similar token. This test is cheaper than the one below. 0.999 allows for rounding.
            min_product = tl.where(found < 0, 0.999 * threshold * row_norm, 1e30)
            if tl.max(tl.max(product - min_product[:, None] * column_norm[None, :], axis=1), axis=0) > 0:
                cosine = product / row_norm[:, None] / column_norm[None, :]
                is_similar = (cosine > threshold) & (column[None, :] != row[:, None]) & (column < length)[None, :]
                last = tl.max(tl.where(is_similar, column[None, :], -1), axis=1)
                last_cosine = tl.sum(tl.where(column[None, :] == last[:, None], cosine, 0.0), axis=1)
                is_first = (found < 0) & (last >= 0)
                found, found_cosine = tl.where(is_first, last, found), tl.where(is_first, last_cosine, found_cosine)
        blocks = tl.where(tl.min(found, axis=0) < 0, blocks - count, 0)
    tl.store(latest + head * length + row, found.to(tl.int64), mask=row < length)
    tl.store(similarity + head * length + row, found_cosine, mask=row < length)
