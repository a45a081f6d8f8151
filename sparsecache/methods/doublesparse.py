"""Double Sparsity: Post-Training Sparse Attention (2024, arXiv 2408.07092).

The channels that weigh most in scores are calibrated once: those with the largest mean |q * k| of a token's own query
and key. These channels of every key are stored once more, as the label cache. A step scores all past tokens by them,
and attends to the tokens of highest score. The default is a quarter of the channels, as in the authors' example for
perplexity.

GQA: a KV head adds |q * k| of its query heads and has one set of channels. It selects the tokens of largest score
margin, as `oracle`.

Differences: the label cache has the dtype of the keys; the authors quantise it, so they read less. Their script for
LongBench takes half of the channels in 2 bits, those with the largest |q|. Keys in host memory are left out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecache.cache.partial_keys import PartialKeyMethod


@dataclass
class DoubleSparse(PartialKeyMethod):
    """Selects by the channels that weigh most in scores."""

    prompt_queries = 0

    def projection(self, q: Tensor, k: Tensor) -> Tensor:
        weight = (q.double() * k.double()[:, None]).abs().mean(2).sum(1)  # [G, D]
        order = weight.sort(dim=-1, descending=True, stable=True).indices
        return torch.nn.functional.one_hot(order, order.shape[1]).mT
