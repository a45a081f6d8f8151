"""Partial keys: a few telling columns of skewed keys, and of the query that the layer before guessed.

Knows nothing of which scores are enough.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsecache.kernels.rows import of_slots
from sparsecache.kernels.scores import partial_scores
from sparsecache.methods._layers import per_layer, spread
from sparsecache.methods.base import Shape
from sparsecache.methods.infinigen.skewing import skew

_BLOCK = 4096  # tokens of a prompt that are skewed at a time


class PartialKeys:
    """The chosen columns of every slot's skewed keys, row by row as the pool holds the tokens.

    columns: [layers, slots, G, I], which columns; mixing: [layers, slots, G, D, I] float32, what makes these of a key
    or query; keys: [layers, slots, G, rows, I].
    """

    def __init__(
        self,
        matrices: Tensor,
        columns: int,
        slots: int,
        rows: int,
        shape: Shape,
        devices: Sequence[torch.device],
        dtype: torch.dtype,
    ) -> None:
        """`matrices`: [layers, G, D, D] float32, of the sparse layers."""
        self._columns, self.rows, self.dtype = columns, rows, dtype
        self._matrices = spread(matrices, devices)
        size = (slots, shape.kv_heads)
        self.columns = per_layer(devices, *size, columns)
        self.mixing = per_layer(devices, *size, shape.head_dim, columns, dtype=torch.float32)
        self.keys = per_layer(devices, *size, rows, columns, dtype=dtype)

    def fill(self, layer: int, slot: int, q: Tensor, k: Tensor) -> Tensor:
        """Chooses the columns of a prompt: those with the largest sum of |q| (heads summed) + |k|.

        q: [H, L, D], k: [G, L, D], rotated. Returns these columns of the keys, [G, L, I], which are not kept before
        `keep`.
        """
        matrices = self._matrices[layer]
        heads = [self._weight(x, matrices).view(len(k), -1, matrices.shape[-1]).sum(1) for x in (q, k)]  # [G, D] each
        order = (heads[0] + heads[1]).sort(dim=-1, descending=True, stable=True).indices
        chosen = order[:, : self._columns].sort(-1).values  # [G, I]
        self.columns[layer, slot] = chosen
        self.mixing[layer, slot] = matrices.gather(2, chosen[:, None].expand(-1, matrices.shape[1], -1))
        return torch.cat([self.of(layer, slot, part).to(self.dtype) for part in torch.split(k, _BLOCK, 1)], 1)

    def of(self, layer: int, slot: int, x: Tensor) -> Tensor:
        """The chosen columns of a slot's queries or keys x [H or G, L, D]: [.., L, I] float32."""
        return skew(x, self.mixing[layer, slot])

    def keep(self, layer: int, slot: int, partial: Tensor) -> None:
        """Keeps a prompt's partial keys [G, rows, I]."""
        self.keys[layer, slot, :, : partial.shape[1]] = partial

    def put(self, layer: int, slots: Tensor, rows: Tensor, k: Tensor) -> None:
        """Puts a new token's k [B, G, 1, D] into row `rows` [B, G] of each slot and KV head."""
        partial = k.float() @ of_slots(self.mixing[layer], slots)  # [B, G, 1, I]
        heads = torch.arange(rows.shape[1], device=rows.device)
        self.keys[layer, slots[:, None], heads, rows] = partial[:, :, 0].to(self.dtype)

    def scores(self, layer: int, slots: Tensor, q: Tensor, rows: int) -> Tensor:
        """Speculated scores [B, H, rows] of the guessed q [B, H, 1, D] over the first `rows` rows."""
        return partial_scores(q, self.mixing[layer], self.keys[layer][:, :, :rows], slots)

    def _weight(self, x: Tensor, matrices: Tensor) -> Tensor:
        """The sum over tokens of |x| skewed: [heads of x, D]."""
        return torch.stack([skew(part, matrices).abs().sum(1) for part in torch.split(x, _BLOCK, 1)]).sum(0)
