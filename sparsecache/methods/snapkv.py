"""SnapKV: LLM Knows What You are Looking for Before Generation (NeurIPS'24, arXiv 2404.14469).

The attention of the prompt's last `window` queries votes for the tokens before them. Votes are pooled over `kernel`
neighbouring positions, so that a token's surroundings stay with it. The tokens with the most votes and the window
stay. Tokens are evicted once, after prefill. Defaults are those of the authors' LongBench runs; the budget and
`dense_layers` are this project's.

GQA: the paper votes per query head. Here the votes of a KV head's query heads are added, then pooled.

Differences: a budget of at most `window` tokens, which the authors' code refuses, keeps the window's last ones. Of
tokens with equal votes, which max pooling makes common, the earlier ones stay.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from sparsecache.cache import EvictionMethod, attention_sums, check_voting, pin_last


@dataclass
class SnapKV(EvictionMethod):
    """Keeps the prompt tokens that the last queries attend to, and every generated token."""

    budget: Annotated[float, "prompt tokens kept, generated ones not counted: a share up to 1, else a count"] = 0.2
    window: Annotated[int, "observation window: last prompt tokens, which vote and always stay, 1 or more"] = 32
    kernel: Annotated[int, "pooling kernel: neighbouring positions that votes are pooled over, an odd number"] = 7
    pooling: Annotated[Literal["max", "average"], "how votes are pooled"] = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_voting(self.window, self.kernel)

    @property
    def prompt_queries(self) -> int:
        return self.window

    def score(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = max(0, k.shape[1] - self.window)
        votes = attention_sums(q, k, first=before)
        if before:
            pool = max_pool1d if self.pooling == "max" else avg_pool1d
            votes[:, :before] = pool(votes[:, :before], self.kernel, stride=1, padding=self.kernel // 2)
        return pin_last(votes, self.window)
