"""Scores of past tokens by a few channels of each query, from keys stored by channel, as in SparQ."""

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_options, pdl_wait, tl, triton, use_kernel

_BLOCK_T = 256  # tokens per program


def channel_scores(
    q: Tensor, channels: Tensor, scale: Tensor, keys: Tensor, seq_lens: Tensor, slots: Tensor, width: int
) -> Tensor:
    """Score past tokens and the current one by some channels: [B, G, H / G, width] float32.

    q: [B, G, H / G, D]; channels: [B, G, I] int64, distinct; scale: [B, G, H / G] float32, by which scores are divided;
    keys: [slots, G, D, T], the current token's included; seq_lens: [slots] int64, past tokens; slots: [B] int64;
    width: how many positions to score, at most T. Later positions than the current one get -inf.
    """
    batch, kv_heads, group, head_dim = q.shape
    count = channels.shape[2]
    if not use_kernel(q):
        heads = torch.arange(kv_heads, device=q.device)[:, None]
        chosen = keys[..., :width][slots[:, None, None], heads, channels].float()  # [B, G, I, width]
        index = channels[:, :, None].expand(-1, -1, group, -1)
        scores = q.float().gather(3, index) @ chosen / scale[..., None]
        is_later = torch.arange(width, device=q.device) > seq_lens[slots][:, None]
        return scores.masked_fill(is_later[:, None, None], -torch.inf)
    scores = torch.empty((batch, kv_heads, group, width), device=q.device, dtype=torch.float32)
    _score_kernel[(batch * kv_heads, -(-width // _BLOCK_T))](
        q.contiguous(), channels.contiguous(), scale.contiguous(), keys, seq_lens, slots, scores,
        kv_heads, head_dim, keys.shape[3], width, count,
        GROUP=group, BLOCK_Q=next_power_of_2(group, 16), BLOCK_I=next_power_of_2(count, 16), BLOCK_T=_BLOCK_T,
        num_warps=4, **pdl_options(),
    )  # fmt: skip
    return scores


@triton.jit(do_not_specialize=["width"])
def _score_kernel(  # type: ignore[no-untyped-def]
    q, channels, scale, keys, seq_lens, slots, scores, kv_heads, head_dim, capacity, width, count,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Score BLOCK_T tokens of a slot for the query heads of a KV head."""
    pdl_wait(USE_PDL)
    owner, row, kv = tl.program_id(0), tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    slot = tl.load(slots + row).to(tl.int64)
    past = tl.load(seq_lens + slot)
    query, at = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_I)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.load(channels + owner * count + at, mask=at < count, other=0)
    q_ptr = q + (owner * GROUP + query)[:, None] * head_dim + channel[None, :]
    q_block = tl.load(q_ptr, mask=(query < GROUP)[:, None] & (at < count)[None, :], other=0.0)
    key_ptr = keys + ((slot * kv_heads + kv) * head_dim + channel)[:, None] * capacity + token[None, :]
    is_seen = (token <= past) & (token < width)
    key = tl.load(key_ptr, mask=(at < count)[:, None] & is_seen[None, :], other=0.0)
    score = tl.dot(q_block, key, input_precision="ieee")
    divisor = tl.load(scale + owner * GROUP + query, mask=query < GROUP, other=1.0)
    score = tl.where(is_seen[None, :], score / divisor[:, None], float("-inf"))
    target = scores + (owner * GROUP + query).to(tl.int64)[:, None] * width + token[None, :]
    tl.store(target, score, mask=(query < GROUP)[:, None] & (token < width)[None, :])
