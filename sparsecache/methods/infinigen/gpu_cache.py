"""Recently fetched tokens of an offloaded cache, kept on the GPU so that only new selections cross the link.

The least recently used go first; of those that were used in the same step, what was found goes before what was fetched,
each in the order of the selection. From kernels a selection is in two runs, the tokens nearest to the cut last (cut.py,
`Selected`), so that a few other ones may be found than on a CPU. It never changes what is attended to, only where it is
read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsecache.kernels.decode import Kept
from sparsecache.kernels.fetch import Recent
from sparsecache.methods._layers import Everywhere, per_layer
from sparsecache.methods.base import Shape
from sparsecache.methods.infinigen.pool import Pool


class GpuCache:
    """`tokens` rows, 1 at least, of every layer, slot and KV head, in front of `rows` in host memory.

    found: [layers, slots, G] int64, how many of the tokens asked for were here.
    """

    def __init__(
        self, devices: Sequence[torch.device], slots: int, tokens: int, rows: int, shape: Shape, dtype: torch.dtype
    ) -> None:
        size = (slots, shape.kv_heads)
        self._kept = per_layer(devices, *size, tokens, 2, shape.head_dim, dtype=dtype)
        self._where = per_layer(devices, *size, rows, dtype=torch.int32, fill=-1)
        self._tokens = per_layer(devices, *size, tokens, dtype=torch.int32, fill=-1)
        self._order = per_layer(devices, *size, tokens, dtype=torch.int32)
        self.found = per_layer(devices, *size)
        self._layers, self._heads = len(devices), Everywhere(torch.arange(shape.kv_heads), devices)
        self._unused = Everywhere(torch.arange(tokens, dtype=torch.int32), devices)
        for layer in range(self._layers):
            self._order[layer, :] = self._unused.on(self._order[layer])

    def of(self, layer: int) -> Recent:
        """What is kept of one layer."""
        parts = (self._kept, self._where, self._tokens, self._order, self.found)
        return Recent(*(part[layer] for part in parts))

    def fetch(self, pool: Pool, layer: int, slots: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """As `Pool.fetch`: rows that are here are not fetched."""
        recent, asked, counts = self.of(layer), rows.clamp(min=0), (rows >= 0).sum(2)
        places = recent.find(slots, asked, counts).places
        fetched = torch.stack(pool.fetch(layer, slots, rows.masked_fill(places >= 0, -1)), 3)
        read = Kept(recent.rows, slots, places).merged(fetched, counts)
        recent.keep(slots, asked, counts, places, read)
        k, v = read.unbind(3)
        return k, v

    def forget(self, layer: int, slots: Tensor, rows: Tensor) -> None:
        """Drops `rows` [B, G], which hold other tokens now."""
        index = (slots[:, None], self._heads.on(slots))
        place = self._where[layer][*index, rows]
        self._where[layer][*index, rows] = -1
        tokens, order = self._tokens[layer][index], self._order[layer][index]
        places = torch.arange(tokens.shape[2], device=slots.device)
        self._tokens[layer][index] = tokens.masked_fill(places == place[..., None], -1)
        first = (order != place[..., None]).int().argsort(dim=-1, stable=True)  # the place that is free now
        self._order[layer][index] = order.gather(2, first)

    def release(self, slot: int) -> None:
        """Forgets a slot."""
        self._where[:, slot] = -1
        self._tokens[:, slot] = -1
        self.found[:, slot] = 0
        for layer in range(self._layers):
            self._order[layer, slot] = self._unused.on(self._order[layer])

    def hits(self, slot: int) -> int:
        """How many tokens were found here."""
        return int(self.found[:, slot].sum())
