"""Key norms: A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (EMNLP'24, arXiv 2406.11430).

Keys of small norm tend to get much attention, so the prompt tokens with the smallest keys stay. Tokens are evicted
once, at the end of the prompt. The paper keeps the first two layers whole, as `dense_layers=2` does here.
"""

from dataclasses import dataclass

from torch import Tensor

from sparsecache.cache import EvictionMethod


@dataclass
class KeyNorm(EvictionMethod):
    """Keeps the prompt tokens with the smallest keys, and every new token."""

    def score(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return -k.float().norm(dim=-1)
