"""TOVA: Transformers are Multi-State RNNs (EMNLP'24, arXiv 2401.06104), applied once, at the end of the prompt.

A prompt token stays if the last query attends to it. Attention is averaged over all heads, so all KV heads keep the
same tokens.
"""

from dataclasses import dataclass

from torch import Tensor

from sparsecache.cache import EvictionMethod, attention_sums, pin_last


@dataclass
class TOVA(EvictionMethod):
    """Keeps the prompt tokens that the last query attends to most, and every new token."""

    def score(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        received = attention_sums(q, k, first=k.shape[1] - 1)  # [G, L]
        return pin_last(received.mean(0, keepdim=True).expand_as(received), 1)
