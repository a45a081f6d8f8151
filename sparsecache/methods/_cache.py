"""Keys and values of all past tokens, a row for each position: what vanilla attends to, and others choose from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsecache.kernels.decode import append, attend_and_append, attend_selected
from sparsecache.methods._host import put
from sparsecache.methods._layers import keys_and_values, per_layer
from sparsecache.methods.base import Shape


class FullCache:
    """The cache of all slots and of a layer for each of `devices`, allocated once.

    keys, values: [layers, slots, G, max_tokens, D], in host memory with `offload`; lengths: [layers, slots], tokens.
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        slots: int,
        max_tokens: int,
        shape: Shape,
        dtype: torch.dtype,
        offload: bool = False,
    ) -> None:
        size = (slots, shape.kv_heads, max_tokens, shape.head_dim)
        self.keys, self.values = keys_and_values(devices, *size, dtype=dtype, offload=offload)
        self.lengths = per_layer(devices, slots)

    def fill(self, layer: int, slot: int, k: Tensor, v: Tensor) -> None:
        """Takes a prompt's k and v [G, L, D] into an empty slot."""
        put(k, self.keys[layer, slot])
        put(v, self.values[layer, slot])
        self.lengths[layer, slot].fill_(k.shape[1])

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
