"""The mean keys of pages, and how similar the keys of a page are to it, as in ShadowKV."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sparsecache.kernels._triton import next_power_of_2, tl, triton, use_kernel

_MAX_BLOCK_T = 16  # tokens of a page per iteration


def page_means(k: Tensor, page: int, pages: int, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the mean keys of the first pages [G, pages, D], and the pages' lowest similarities [G, pages].

    A page's similarities are the cosine similarities of its keys to their mean, float32. k: [G, L, D], L at least
    page * pages; page: tokens in a page; pages: how many. out: where to store the means, in its dtype; without it they
    are float32.
    """
    kv_heads, _, head_dim = k.shape
    if not (use_kernel(k) and pages):
        paged = k[:, : pages * page].reshape(kv_heads, pages, page, head_dim).float()
        mean = paged.mean(2)
        similarities = cosine_similarity(mean[:, :, None], paged, dim=3).amin(2)
        return mean if out is None else out.copy_(mean), similarities
    means = torch.empty((kv_heads, pages, head_dim), device=k.device, dtype=torch.float32) if out is None else out
    similarities = torch.empty((kv_heads, pages), device=k.device, dtype=torch.float32)
    _mean_kernel[(pages, kv_heads)](
        k, k.stride(0), k.stride(1), means, means.stride(0), similarities, pages, head_dim,
        PAGE=page, BLOCK_T=min(_MAX_BLOCK_T, next_power_of_2(page)), BLOCK_D=next_power_of_2(head_dim), num_warps=1,
    )  # fmt: skip
    return means, similarities


@triton.jit(do_not_specialize=["pages"])
def _mean_kernel(  # type: ignore[no-untyped-def]
    keys, head_stride, row_stride, means, means_stride, similarities, pages, head_dim,
    PAGE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Find the mean and the lowest similarity of one page of a KV head."""
    page, kv = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    token, channel = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_D)
    source = keys + kv * head_stride + (page * PAGE + token) * row_stride + channel[None, :]
    in_head = channel < head_dim
    mean = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in tl.range(0, PAGE, BLOCK_T):
        mask = (first + token < PAGE) & in_head[None, :]
        mean += tl.sum(tl.load(source + first * row_stride, mask=mask, other=0.0).to(tl.float32), axis=0)
    mean /= PAGE
    norm = tl.maximum(tl.sqrt(tl.sum(mean * mean, axis=0)), 1e-8)  # as torch's cosine_similarity
    lowest = tl.full((BLOCK_T,), float("inf"), dtype=tl.float32)
    for first in tl.range(0, PAGE, BLOCK_T):
        is_in_page = first + tl.arange(0, BLOCK_T) < PAGE
        mask = is_in_page[:, None] & in_head[None, :]
        key = tl.load(source + first * row_stride, mask=mask, other=0.0).to(tl.float32)
        norms = tl.maximum(tl.sqrt(tl.sum(key * key, axis=1)), 1e-8)
        similarity = tl.sum(key * mean[None, :], axis=1) / (norms * norm)
        lowest = tl.minimum(lowest, tl.where(is_in_page, similarity, float("inf")))
    tl.store(means + kv * means_stride + page * head_dim + channel, mean, mask=in_head)
    tl.store(similarities + kv * pages + page, tl.min(lowest, axis=0))
