"""Oracle: the tokens with the highest true scores, the ceiling of any selection (InfiniGen's rule without guessing).

It reads every key to choose, so it saves nothing; it shows what a perfect guess would keep. GQA: as in `infinigen`.
"""

import math
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from sparsecache.kernels.rows import of_slots
from sparsecache.kernels.scores import scaled_scores
from sparsecache.kernels.selection import Fetch, select
from sparsecache.methods._sparse import ChoosingMethod


class Oracle(ChoosingMethod):
    """Chooses by the true query and all columns of the keys."""

    lossless: ClassVar[dict[str, Any] | None] = {"budget": 1.0}
    tight: ClassVar[dict[str, Any]] = {"budget": 4, "dense_layers": 0}

    def __init__(
        self,
        budget: Annotated[float, "most past tokens attended to: a share of them up to 1, else a count"] = 0.2,
        alpha: Annotated[float, "how far below the best score a token may be; inf: the budget alone counts"] = math.inf,
        fetch: Annotated[Fetch, "one count for a layer, the mean over its KV heads, or a count for each"] = "mean",
        dense_layers: Annotated[int, "first layers that attend to everything"] = 2,
    ) -> None:
        super().__init__(budget, dense_layers)
        if not alpha >= 0:
            raise ValueError(f"alpha={alpha} must be 0 or more (inf: no limit but the budget).")
        self._alpha, self._fetch = alpha, fetch

    def choose(self, layer: int, q: Tensor, slots: Tensor, past: Tensor, cap: Tensor) -> Tensor:
        length = int(past.max())
        keys = of_slots(self.cache.keys[layer], slots)[:, :, :length]
        scores = scaled_scores(q, keys, self.shape.head_dim)[:, :, 0]  # [B, H, length]
        unseen = torch.arange(length, device=q.device) >= past[:, None]
        scores = scores.masked_fill(unseen[:, None], -torch.inf)
        return select(scores, self.shape.kv_heads, self._alpha, cap, self._fetch)
