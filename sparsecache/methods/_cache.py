"""Keys and values of all past tokens, a row for each position: what vanilla attends to, and others choose from."""

import torch
from torch import Tensor

from sparsecache.kernels.decode import append, attend_and_append, attend_selected
from sparsecache.methods.base import Shape


class FullCache:
    """The cache of `layers` layers and all slots, allocated once.

    keys, values: [layers, slots, G, max_tokens, D]; lengths: [layers, slots], tokens held.
    """

    def __init__(
        self, layers: int, slots: int, max_tokens: int, shape: Shape, device: torch.device, dtype: torch.dtype
    ) -> None:
        size = (layers, slots, shape.kv_heads, max_tokens, shape.head_dim)
        self.keys = torch.zeros(size, device=device, dtype=dtype)
        self.values = torch.zeros(size, device=device, dtype=dtype)
        self.lengths = torch.zeros((layers, slots), device=device, dtype=torch.int64)

    def fill(self, layer: int, slot: int, k: Tensor, v: Tensor) -> None:
        """Takes a prompt's k and v [G, L, D] into an empty slot."""
        length = k.shape[1]
        self.keys[layer, slot, :, :length] = k
        self.values[layer, slot, :, :length] = v
        self.lengths[layer, slot] = length

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        """Takes one token's k and v [B, G, 1, D] into each slot; attention of q [B, H, 1, D] over all its tokens.

        A slot that is not in flight may have run full: its last row is written again.
        """
        return attend_and_append(q, k, v, self.keys[layer], self.values[layer], self.lengths[layer], slots)

    def attend_selected(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, selected: Tensor) -> Tensor:
        """The same over the token itself and the positions `selected` [B, G, N], ascending, then -1."""
        keys, values, lengths = self.keys[layer], self.values[layer], self.lengths[layer]
        out = attend_selected(q, k, v, keys, values, slots, selected, (selected >= 0).sum(2))
        append(k, v, keys, values, lengths, slots)
        return out

    def release(self, slot: int) -> None:
        """Forgets a slot."""
        self.lengths[:, slot] = 0
