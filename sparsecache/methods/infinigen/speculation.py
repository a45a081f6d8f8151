"""Speculated scores: a few telling columns of skewed keys, and of the query that the layer before guessed.

Knows nothing of which scores are enough.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsecache.kernels.scores import scaled_scores
from sparsecache.methods._layers import per_layer, spread
from sparsecache.methods.base import Shape
from sparsecache.methods.infinigen.skewing import skew


class PartialKeys:
    """The chosen columns of every slot's skewed keys, row by row as the pool holds the tokens.

    columns: [layers, slots, G, I], which columns; keys: [layers, slots, G, rows, I].
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
        self._shape, self._columns, self._dtype = shape, columns, dtype
        self._matrices = spread(matrices, devices)
        self.columns = per_layer(devices, slots, shape.kv_heads, columns)
        self.keys = per_layer(devices, slots, shape.kv_heads, rows, columns, dtype=dtype)

    def fill(self, layer: int, slot: int, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses the columns of a prompt: those with the largest sum of |q| (heads summed) + |k|.

        q: [H, L, D], k: [G, L, D], rotated. Returns these columns of both: [H, L, I] and [G, L, I]; the keys are
        not kept before `keep`.
        """
        heads, kv_heads = self._shape.heads, self._shape.kv_heads
        q, k = skew(q, self._matrices[layer]), skew(k, self._matrices[layer])
        weight = q.abs().sum(1).view(kv_heads, heads // kv_heads, -1).sum(1) + k.abs().sum(1)  # [G, D]
        order = weight.sort(dim=-1, descending=True, stable=True).indices
        chosen = order[:, : self._columns].sort(-1).values  # [G, I]
        self.columns[layer, slot] = chosen
        of_heads = chosen.repeat_interleave(heads // kv_heads, 0)
        return _columns(q, of_heads[:, None]), _columns(k, chosen[:, None]).to(self._dtype)

    def keep(self, layer: int, slot: int, partial: Tensor) -> None:
        """Keeps a prompt's partial keys [G, rows, I]."""
        self.keys[layer, slot, :, : partial.shape[1]] = partial

    def put(self, layer: int, slots: Tensor, rows: Tensor, k: Tensor) -> None:
        """Puts a new token's k [B, G, 1, D] into row `rows` [B, G] of each slot and KV head."""
        partial = _columns(skew(k, self._matrices[layer]), self.columns[layer, slots][:, :, None])  # [B, G, 1, I]
        heads = torch.arange(rows.shape[1], device=rows.device)
        self.keys[layer, slots[:, None], heads, rows] = partial[:, :, 0].to(self._dtype)

    def scores(self, layer: int, slots: Tensor, q: Tensor, rows: int) -> Tensor:
        """Speculated scores [B, H, rows] of the guessed q [B, H, 1, D] over the first `rows` rows."""
        group = self._shape.heads // self._shape.kv_heads
        columns = self.columns[layer, slots].repeat_interleave(group, 1)[:, :, None]  # [B, H, 1, I]
        partial = _columns(skew(q, self._matrices[layer]), columns)
        return scaled_scores(partial, self.keys[layer, slots, :, :rows], self._shape.head_dim)[:, :, 0]


def _columns(x: Tensor, columns: Tensor) -> Tensor:
    """Columns [.., 1, I] of x [.., L, D], for every row: [.., L, I]."""
    return x.gather(-1, columns.expand(*x.shape[:-1], columns.shape[-1]))
