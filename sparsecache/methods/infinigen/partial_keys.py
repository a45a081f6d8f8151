"""Partial keys: the channels of keys that speculate, chosen per prompt after skewing, in 16 bits or as codes."""

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig
from sparsecache.kernels.partial_codes import PartialCodes, make_partial_codes
from sparsecache.kernels.skewed_sums import skewed_sums
from sparsecache.methods.infinigen.skewing import skew

_BLOCK = 16384  # prompt tokens that are skewed or encoded at a time


class PartialKeys:
    """The partial channels of every slot's keys.

    projection: [slots, G, D, I] float32, from a key or query to its partial channels; None: they are all channels of
    the keys themselves, without skewing, which would not change the scores. keys: [slots, G, T, I], or their codes.
    """

    def __init__(self, matrices: Tensor | None, channels: int, config: CacheConfig, bits: int = 16) -> None:
        """matrices: [G, D, D] float32, the layer's skewing matrices; None if all channels speculate.

        bits: of a channel. 16: in the cache's dtype; 8 or 4: codes, with 4 of an even number of channels.
        """
        self._channels = channels
        self._matrices: Tensor | None = None
        self.projection: Tensor | None = None
        if channels < config.shape.head_dim:
            assert matrices is not None, "fewer channels than all need a projection"
            self._matrices = matrices.to(config.device)
            self.projection = config.zeros(config.shape.head_dim, channels, dtype=torch.float32)
        self.keys: Tensor | PartialCodes
        if bits == 16:
            self.keys = config.zeros(config.max_tokens, channels)
        else:
            size = (config.slots, config.shape.kv_heads, config.max_tokens, channels)
            self.keys = make_partial_codes(size, bits, config.device)

    @property
    def token_nbytes(self) -> int:
        """Return the bytes of a token's partial key in one KV head."""
        rows = self.keys.codes if isinstance(self.keys, PartialCodes) else self.keys
        return rows.shape[3] * rows.itemsize

    def prefill(self, slot: int, q: Tensor, k: Tensor) -> None:
        """Choose a prompt's partial channels and keep them of its keys; q: [H, L, D], k: [G, L, D], rotated."""
        if self._matrices is not None and self.projection is not None:
            self.projection[slot] = self._choose(self._matrices, q, k)
        if isinstance(self.keys, PartialCodes):
            # The channels of a block are projected twice, so that those of the whole prompt need no memory.
            lowest, highest = zip(*(block.aminmax(dim=1) for _, block in self._blocks(slot, k)), strict=True)
            self.keys.set_range(slot, reduce(torch.minimum, lowest), reduce(torch.maximum, highest))
        for start, block in self._blocks(slot, k):
            if isinstance(self.keys, PartialCodes):
                self.keys.store(slot, start, block)
            else:
                self.keys[slot, :, start : start + block.shape[1]] = block

    def _choose(self, matrices: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Return the projection to the channels of a prompt with the largest sums, [G, D, I].

        The sum is over tokens, of |q| (heads summed) + |k|, after skewing.
        """
        sums = [skewed_sums(x, matrices).view(len(k), -1, k.shape[2]).sum(1) for x in (q, k)]  # [G, D] each
        order = (sums[0] + sums[1]).sort(dim=-1, descending=True, stable=True).indices
        chosen = order[:, : self._channels].sort(-1).values  # [G, I]
        return matrices.gather(2, chosen[:, None].expand(-1, k.shape[2], -1))

    def _blocks(self, slot: int, k: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the partial channels of a prompt's keys by blocks of tokens: the first token, and [G, N, I]."""
        for start in range(0, k.shape[1], _BLOCK):
            block = k[:, start : start + _BLOCK]
            yield start, block if self.projection is None else skew(block, self.projection[slot])
