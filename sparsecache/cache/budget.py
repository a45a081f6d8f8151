"""Budgets: how many past tokens a KV head may attend to."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """A share of the past tokens up to 1, above that a whole number of tokens."""

    amount: float

    def __post_init__(self) -> None:
        share, count = 0 < self.amount <= 1, self.amount > 1 and math.isfinite(self.amount)
        if not share and not (count and self.amount == math.floor(self.amount)):
            raise ValueError(f"budget={self.amount} must be a share above 0 up to 1, or a whole number of tokens.")

    def tokens(self, past: int) -> int:
        """Return the most tokens of `past`: 1 or more."""
        return max(1, math.floor(self.amount * past + 1e-6)) if self.amount <= 1 else int(min(self.amount, 2**62))

    def maximum(self, max_tokens: int) -> int:
        """Return the highest budget of any number of past tokens up to max_tokens."""
        return self.tokens(max_tokens)

    def table(self, max_tokens: int, device: torch.device) -> Tensor:
        """Return the tokens of 0 to max_tokens past ones, [max_tokens + 1] int64: made once, on the host, exactly."""
        return torch.tensor([self.tokens(past) for past in range(max_tokens + 1)]).to(device)
