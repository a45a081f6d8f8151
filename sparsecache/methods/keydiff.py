"""KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference (NeurIPS'25, arXiv 2504.15364).

Keys that differ from the others tend to get attention. The prompt tokens with the lowest cosine similarity of their key
to the mean key of the KV head stay. Keys are scaled to length 1 before the mean is taken. No attention is computed. GQA
changes nothing: keys are those of KV heads.

Differences: the paper reads the prompt in blocks and evicts after each one, and while decoding. Here tokens are evicted
once, after prefill, as in kvpress, and generated tokens stay. By default kvpress evicts before the question comes; here
the question is part of the prompt, and `recent` keeps it. The paper states budgets of 2K to 8K tokens; the default is
this project's.
"""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor
from torch.nn.functional import normalize

from sparsecache.cache.checks import check_token_counts
from sparsecache.cache.eviction import EvictionMethod, pin_last


@dataclass
class KeyDiff(EvictionMethod):
    """Keeps the prompt tokens with the most distinctive keys, and every generated token."""

    prompt_queries = 0

    recent: Annotated[int, "last prompt tokens that always stay, 0 or more"] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_token_counts(recent=self.recent)

    def score(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        unit = normalize(k.float(), dim=-1)
        mean = normalize(unit.mean(1, keepdim=True), dim=-1)
        return pin_last(-(unit @ mean.mT)[..., 0], self.recent)
