"""Recently fetched tokens of an offloaded pool, kept on the GPU so that only new selections cross the link.

The least recently used go first. It never changes what is attended to, only where it is read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsecache.methods._layers import Everywhere, per_layer
from sparsecache.methods.base import Shape
from sparsecache.methods.infinigen.pool import Pool


class GpuCache:
    """`tokens` rows of every layer, slot and KV head, in front of a pool in host memory; counts what is fetched."""

    def __init__(
        self, devices: Sequence[torch.device], slots: int, tokens: int, shape: Shape, dtype: torch.dtype
    ) -> None:
        size = (slots, shape.kv_heads, tokens)
        self._keys = per_layer(devices, *size, shape.head_dim, dtype=dtype)
        self._values = per_layer(devices, *size, shape.head_dim, dtype=dtype)
        self._rows = per_layer(devices, *size, fill=-1)
        self._used = per_layer(devices, *size, fill=-1)  # position of the last query to read it
        self._heads = Everywhere(torch.arange(shape.kv_heads), devices)
        self._read = per_layer(devices, slots)
        self._hits = per_layer(devices, slots)
        self._bytes_each = 2 * shape.head_dim * dtype.itemsize

    def fetch(self, pool: Pool, layer: int, slots: Tensor, rows: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """As `Pool.fetch`, for the queries at positions `at` [B]: rows that are here are not fetched."""
        valid = rows >= 0
        index = (slots[:, None], self._heads.on(slots))
        same = (rows[..., None] == self._rows[layer][index][:, :, None]) & valid[..., None]  # [B, G, N, tokens]
        hit = same.any(-1)
        k, v = pool.fetch(layer, slots, rows.masked_fill(hit, -1))
        if same.shape[-1]:
            place = same.int().argmax(-1)[..., None].expand_as(k)
            k = torch.where(hit[..., None], self._keys[layer][index].gather(2, place), k)
            v = torch.where(hit[..., None], self._values[layer][index].gather(2, place), v)
            self._keep(layer, index, same, rows.masked_fill(hit, -1), k, v, at)
        self._read[layer, slots] += valid.sum((1, 2))
        self._hits[layer, slots] += hit.sum((1, 2))
        return k, v

    def forget(self, layer: int, slots: Tensor, rows: Tensor) -> None:
        """Drops `rows` [B, G], which hold other tokens now."""
        index = (slots[:, None], self._heads.on(slots))
        stale = self._rows[layer][index] == rows[..., None]
        self._rows[layer][index] = self._rows[layer][index].masked_fill(stale, -1)
        self._used[layer][index] = self._used[layer][index].masked_fill(stale, -1)

    def release(self, slot: int) -> None:
        """Forgets a slot."""
        self._rows[:, slot] = -1
        self._used[:, slot] = -1
        self._read[:, slot] = 0
        self._hits[:, slot] = 0

    def report(self, slot: int) -> dict[str, int | float | None]:
        """Bytes fetched over the link, and the share of selected tokens that were found here."""
        read, hits = int(self._read[:, slot].sum()), int(self._hits[:, slot].sum())
        return {"fetched_bytes": (read - hits) * self._bytes_each, "gpu_cache_hit": hits / read if read else None}

    def _keep(
        self, layer: int, index: tuple[Tensor, Tensor], same: Tensor, new: Tensor, k: Tensor, v: Tensor, at: Tensor
    ) -> None:
        """Keeps the most recently used of what is here and the `new` rows [B, G, N] (-1: not new)."""
        now = at[:, None, None]
        used = torch.where(same.any(2), now, self._used[layer][index])  # [B, G, tokens]
        rows = torch.cat((self._rows[layer][index], new), 2)
        used = torch.cat((used, torch.where(new >= 0, now, -1)), 2)
        # Stable, so that what stays of equally recent ones does not hang on how many the batch's other rows fetch.
        latest = used.sort(dim=-1, descending=True, stable=True).indices[..., : same.shape[-1]]
        of_rows = latest[..., None].expand(-1, -1, -1, k.shape[-1])
        self._rows[layer][index], self._used[layer][index] = rows.gather(2, latest), used.gather(2, latest)
        self._keys[layer][index] = torch.cat((self._keys[layer][index], k), 2).gather(2, of_rows)
        self._values[layer][index] = torch.cat((self._values[layer][index], v), 2).gather(2, of_rows)
