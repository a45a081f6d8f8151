"""Partial keys: the channels of skewed keys that speculate, chosen per prompt."""

import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig
from sparsecache.kernels.skewed_sums import skewed_sums
from sparsecache.methods.infinigen.skewing import skew

_BLOCK = 16384  # prompt tokens that are skewed at a time


class PartialKeys:
    """The partial channels of every slot's keys.

    projection: [slots, G, D, I] float32, from a key or query to its partial channels. keys: [slots, G, T, I].
    """

    def __init__(self, matrices: Tensor, channels: int, config: CacheConfig) -> None:
        """matrices: [G, D, D] float32, the layer's skewing matrices."""
        self._matrices, self._channels = matrices.to(config.device), channels
        self.projection = config.zeros(config.shape.head_dim, channels, dtype=torch.float32)
        self.keys = config.zeros(config.max_tokens, channels)

    def prefill(self, slot: int, q: Tensor, k: Tensor) -> None:
        """Choose a prompt's partial channels and keep them of its keys; q: [H, L, D], k: [G, L, D], rotated.

        The channels with the largest sum over tokens of |q| (heads summed) + |k| are chosen, after skewing.
        """
        sums = [skewed_sums(x, self._matrices).view(len(k), -1, k.shape[2]).sum(1) for x in (q, k)]  # [G, D] each
        order = (sums[0] + sums[1]).sort(dim=-1, descending=True, stable=True).indices
        chosen = order[:, : self._channels].sort(-1).values  # [G, I]
        self.projection[slot] = self._matrices.gather(2, chosen[:, None].expand(-1, k.shape[2], -1))
        for start in range(0, k.shape[1], _BLOCK):
            block = k[:, start : start + _BLOCK]
            self.keys[slot, :, start : start + block.shape[1]] = skew(block, self.projection[slot])
