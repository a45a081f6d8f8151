"""Loki: Low-rank Keys for Efficient Sparse Attention (NeurIPS'24, arXiv 2406.02542).

The principal components of a layer's keys are calibrated once. A step scores all past tokens by the first `channels`
components of query and keys, and attends to the tokens of highest score. The default is the authors': a quarter of the
channels. Their budget is a quarter of the tokens too.

GQA: a KV head has one set of components, as in the paper. The paper lets every query head select its own tokens. Here
a KV head selects the tokens of largest score margin, as `oracle`.

Differences: the paper chooses per model whether components are made before or after RoPE; here it is after. The paper
keeps keys in the rotated basis alone; here the first components are kept beside the keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecache.cache.partial_keys import PartialKeyMethod


@dataclass
class Loki(PartialKeyMethod):
    """Selects by the principal components of keys."""

    prompt_queries = 0

    def projection(self, q: Tensor, k: Tensor) -> Tensor:
        centred = k.double() - k.double().mean(1, keepdim=True)
        _, components = torch.linalg.eigh(centred.mT @ centred)  # in order of rising variance
        reversed_components: Tensor = components.flip(-1)
        return reversed_components
