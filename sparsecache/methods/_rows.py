"""A bounded number of tokens for each slot and KV head of one layer: what methods that evict have instead of all rows.

It does not know who is to stay, only how to take, attend to and drop.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsecache.kernels.attention import attention
from sparsecache.kernels.scores import scaled_scores
from sparsecache.methods.base import Shape

FREE = -1


class Rows:
    """Keys and values in no order, each KV head its own, with the positions that they had.

    keys, values: [slots, G, rows, D]; positions: [slots, G, rows], FREE where a row holds no token.
    """

    def __init__(self, slots: int, rows: int, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        size = (slots, shape.kv_heads, rows)
        self.keys = torch.zeros(*size, shape.head_dim, device=device, dtype=dtype)
        self.values = torch.zeros(*size, shape.head_dim, device=device, dtype=dtype)
        self.positions = torch.full(size, FREE, device=device)
        self._heads = torch.arange(shape.kv_heads, device=device)

    def reserve(self, rows: int) -> None:
        """Grows to `rows` rows at least; what is held stays."""
        more = rows - self.positions.shape[2]
        if more > 0:
            self.keys, self.values = pad(self.keys, (0, 0, 0, more)), pad(self.values, (0, 0, 0, more))
            self.positions = pad(self.positions, (0, more), value=FREE)

    def fill(self, slot: int, k: Tensor, v: Tensor, kept: Tensor) -> None:
        """Takes the tokens `kept` [G, N] of a prompt's k and v [G, L, D] into the first rows of an empty slot."""
        index = kept[..., None].expand(-1, -1, k.shape[2])
        count = kept.shape[1]
        self.keys[slot, :, :count], self.values[slot, :, :count] = k.gather(1, index), v.gather(1, index)
        self.release(slot)  # a slot that was not in flight may have been written to
        self.positions[slot, :, :count] = kept

    def held(self, slots: Tensor) -> Tensor:
        """Tokens that each KV head holds: [B, G]."""
        return (self.positions[slots] != FREE).sum(2)

    def append(self, slots: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
        """Takes one token [B, G, 1, D] at `position` [B] into a free row of each slot and KV head.

        A slot that is not in flight may have none left: its oldest token goes.
        """
        rows = self.positions[slots].argmin(2)  # FREE is the lowest
        index = (slots[:, None], self._heads, rows)
        self.keys[index], self.values[index] = k[:, :, 0], v[:, :, 0]
        self.positions[index] = position[:, None]

    def attend(self, q: Tensor, slots: Tensor) -> Tensor:
        """Attention of q [B, H, 1, D] over all that its slot holds."""
        count, kv_heads, _, head_dim = self.keys.shape
        # All slots in one call, so that nothing is copied: rows of slots not asked for are dropped again.
        every = q.new_zeros((count, *q.shape[1:]))
        every[slots] = q
        folded = every.view(count * kv_heads, -1, 1, head_dim)  # each KV head has a mask of its own
        keys, values = (x.flatten(0, 1)[:, None] for x in (self.keys, self.values))
        seen = (self.positions != FREE).flatten(0, 1)[:, None, None]
        return attention(folded, keys, values, mask=seen).view(every.shape)[slots]

    def probabilities(self, q: Tensor, slots: Tensor) -> Tensor:
        """The attention of q [B, H, 1, D] to each row, summed over the heads of a KV head: [B, G, rows] float32."""
        keys, free = self.keys[slots], self.positions[slots] == FREE
        scores = scaled_scores(q, keys, keys.shape[3]).view(*free.shape[:2], -1, free.shape[2])  # [B, G, g, rows]
        return scores.masked_fill(free[:, :, None], -torch.inf).softmax(-1).sum(2)

    def drop_least(self, slots: Tensor, worth: Tensor, cap: Tensor) -> None:
        """Drops the token of least `worth` [B, G, rows] where more than `cap` [B] are held; of equals the earliest."""
        positions = self.positions[slots]
        worth = worth.masked_fill(positions == FREE, torch.inf)
        last = torch.iinfo(torch.int64).max
        rows = positions.masked_fill(worth != worth.amin(2, keepdim=True), last).argmin(2)
        over = self.held(slots) > cap[:, None]
        index = (slots[:, None], self._heads, rows)
        self.positions[index] = self.positions[index].masked_fill(over, FREE)

    def release(self, slot: int) -> None:
        """Forgets a slot."""
        self.positions[slot] = FREE
