"""H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (NeurIPS'23, arXiv 2306.14048).

Half of the budget goes to the most recent tokens (the larger half if it is odd), half to the heavy hitters: those of
the others that got the most attention so far. At each step the attention of the new query is added to what every kept
token got; when the budget is full, the token that got least and is not recent leaves, of equals the earliest.

GQA: the paper counts for each head. Here a KV head counts for all its query heads together and evicts for them all.

What differs from the paper: it lets tokens leave while the prompt is read. Here, as in the authors' own code that
really drops tokens, the prompt's attention is dense and tokens leave at its end, by the attention of all its queries.
"""

from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from sparsecache.methods._evicting import EvictingMethod, attention_sums


class H2O(EvictingMethod):
    """Keeps the tokens that got the most attention, and the last ones."""

    lossless: ClassVar[dict[str, Any] | None] = {"budget": 1.0, "dense_layers": 0}
    tight: ClassVar[dict[str, Any]] = {"budget": 6, "dense_layers": 0}

    def __init__(
        self,
        budget: Annotated[float, "most past tokens kept, half of them recent: a share up to 1, else a count"] = 0.2,
        dense_layers: Annotated[int, "first layers that attend to everything"] = 2,
    ) -> None:
        super().__init__(budget, dense_layers)

    def make_room(self, layers: int, slots: int, max_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        super().make_room(layers, slots, max_tokens, device, dtype)
        # The attention that the token of each row got so far, [slots, G, rows] a layer.
        self._got = [torch.zeros(rows.positions.shape, device=rows.positions.device) for rows in self.rows]

    def choose_prompt(self, layer: int, slot: int, q: Tensor, k: Tensor, count: int) -> Tensor:
        kv_heads, length = k.shape[:2]
        got = attention_sums(q, k, first=0)
        recent = torch.arange(length - (count + 1) // 2, length, device=k.device)
        others = length - len(recent)
        rising = got[:, :others].sort(dim=-1, stable=True).indices
        stay = torch.cat((rising[:, others - count // 2 :], recent.expand(kv_heads, -1)), 1)
        self._got[layer][slot, :, :count] = got.gather(1, stay)
        return stay

    def make_way(self, layer: int, q: Tensor, slots: Tensor, past: Tensor, cap: Tensor) -> None:
        rows = self.rows[layer]
        positions, past = rows.positions[slots], past[:, None, None]
        before = self._got[layer][slots].masked_fill(positions == past - 1, 0)  # the row was another token's
        got = before + rows.probabilities(q, slots)
        self._got[layer][slots] = got
        recent = positions >= past - (cap[:, None, None] + 1) // 2
        rows.drop_least(slots, got.masked_fill(recent, torch.inf), cap)
