"""PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling (COLM'25, arXiv 2406.02069).

SnapKV with a budget per layer. Every layer keeps the last `window` tokens of the prompt. The rest of the budget
falls linearly from the first sparse layer to the last one, which gets `1 / beta` of the mean. The mean over the
sparse layers is the budget. Where the first layer would get more than there is, the surplus goes to the last layers.

GQA: as in `snapkv`. Defaults are those of the authors' LongBench runs; the budget is this project's.

Differences: counts are rounded to the nearest, not down, so that they add up to the budget. A budget of at most
`window` tokens is the same in all layers. Dense layers are not part of the pyramid. The authors' code gives all layers
the same budget for prompts shorter than 2 * (budget - window) tokens. Here they get a pyramid too.

Memory: a layer has rows for the most that it may keep of any prompt. With a budget given as a count, a late layer keeps
the most of a prompt that is just longer than the budget.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from sparsecache.cache.base import Shape
from sparsecache.cache.budget import Budget
from sparsecache.methods.snapkv import SnapKV


@dataclass
class PyramidKV(SnapKV):
    """Keeps what SnapKV keeps, with more tokens in early layers and fewer in late ones."""

    budget: Annotated[float, "mean prompt tokens kept per layer: a share up to 1, else a count"] = 0.2
    window: Annotated[int, "observation window: last prompt tokens, which vote and always stay, 1 or more"] = 8
    beta: Annotated[int, "mean budget of a layer divided by that of the last layer, without the window, 1 or more"] = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise ValueError(f"beta={self.beta} must be 1 or more (1: the same budget in all layers).")

    def layer_budget(self, layer: int, shape: Shape) -> Budget:
        sparse_layers = shape.layers - self.dense_layers
        if sparse_layers < 2:
            return Budget(self.budget)
        steps = sparse_layers - 1
        return PyramidBudget(self.budget, self.window, self.beta, (steps - 2 * (layer - self.dense_layers)) / steps)


@dataclass(frozen=True)
class PyramidBudget(Budget):
    """The budget of one layer of a pyramid. amount: the mean. tilt: 1 in the first sparse layer to -1 in the last."""

    window: int
    beta: int
    tilt: float

    def tokens(self, past: int) -> int:
        """As Budget.tokens, by the formula of `_counts`, whose operations on one number take the host longer."""
        mean = max(1, math.floor(self.amount * past + 1e-6)) if self.amount <= 1 else self.amount
        voted = mean - self.window
        if voted <= 0 or mean >= past:
            return int(min(mean, max(past, 1)))
        most = min(voted * 2 - voted / self.beta, past - self.window)
        return int(self.window + round(voted + self.tilt * (most - voted)))

    def maximum(self, max_tokens: int) -> int:
        return int(self._counts(torch.arange(max_tokens + 1)).max())

    def table(self, max_tokens: int, device: torch.device) -> Tensor:
        return self._counts(torch.arange(max_tokens + 1)).to(device)

    def _counts(self, past: Tensor) -> Tensor:
        """Return the tokens kept of each number of past tokens: int64."""
        past = past.double()
        mean = (self.amount * past + 1e-6).floor().clamp(min=1) if self.amount <= 1 else past.new_tensor(self.amount)
        voted = mean - self.window  # mean tokens outside the window
        most = torch.minimum(voted * 2 - voted / self.beta, past - self.window)
        count = self.window + (voted + self.tilt * (most - voted)).round()
        return torch.where((voted > 0) & (mean < past), count, torch.minimum(mean, past.clamp(min=1))).long()
