"""SnapKV: LLM Knows What You are Looking for Before Generation (NeurIPS'24, arXiv 2404.14469).

The last `window` queries of a prompt vote, by their attention, for the tokens before them; votes are pooled over
`kernel` neighbouring positions, so that what stands around a token comes along. The tokens with the most votes and the
window itself stay. This is done once, at the end of the prompt: the budget is that of the prompt's length, and
generated tokens are kept and attended to ON TOP of it. Defaults are those of the authors' LongBench runs.

GQA: the paper votes for each head. Here the votes of all query heads of a KV head are added, and then pooled.

What differs: with a budget of no more tokens than the window, which the authors' code refuses, its last ones stay.
Of tokens with equal votes, which max pooling makes common, the earlier ones stay.
"""

from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsecache.methods._evicting import EvictingMethod, attention_sums
from sparsecache.methods._layers import per_layer


class SnapKV(EvictingMethod):
    """Keeps what the end of the prompt looked at, and all that is generated."""

    keeps_new: ClassVar[bool] = True
    lossless: ClassVar[dict[str, Any] | None] = {"budget": 1.0, "dense_layers": 0}
    tight: ClassVar[dict[str, Any]] = {"budget": 4, "window": 2, "kernel": 3, "dense_layers": 0}

    def __init__(
        self,
        budget: Annotated[
            float, "most prompt tokens kept, generated ones not counted: a share up to 1, else a count"
        ] = 0.2,
        window: Annotated[int, "last prompt tokens, whose queries vote and which always stay, 1 or more"] = 32,
        kernel: Annotated[int, "neighbouring positions that votes are pooled over, an odd number"] = 7,
        pooling: Annotated[Literal["max", "average"], "how votes are pooled"] = "max",
        dense_layers: Annotated[int, "first layers that attend to everything"] = 2,
    ) -> None:
        super().__init__(budget, dense_layers)
        if window < 1:
            raise ValueError(f"window={window} must be 1 token or more.")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel={kernel} must be an odd number of positions, 1 or more.")
        self._window, self._kernel, self._pooling = window, kernel, pooling

    def make_room(self, layers: int, slots: int, max_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        super().make_room(layers, slots, max_tokens, device, dtype)
        self._evicted = per_layer(self.devices, slots)

    def past_and_cap(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        past, _ = super().past_and_cap(layer, slots)
        return past, past - self._evicted[layer, slots]

    def take_prompt(self, layer: int, slot: int, q: Tensor, k: Tensor, v: Tensor, max_new_tokens: int) -> None:
        length = k.shape[1]
        count = min(self.budget.cap(length), length)
        self._evicted[layer, slot].fill_(length - count)
        self.rows[layer].reserve(count + max_new_tokens)
        super().take_prompt(layer, slot, q, k, v, max_new_tokens)

    def choose_prompt(self, layer: int, slot: int, q: Tensor, k: Tensor, count: int) -> Tensor:
        kv_heads, length = k.shape[:2]
        before = length - min(self._window, count)
        window = torch.arange(before, length, device=k.device).expand(kv_heads, -1)
        if count <= self._window:
            return window
        votes = attention_sums(q, k, first=before)[:, :before]
        falling = self._pooled(votes).sort(dim=-1, descending=True, stable=True).indices
        return torch.cat((falling[:, : count - self._window], window), 1)

    def _pooled(self, votes: Tensor) -> Tensor:
        """Votes [G, N], each with its neighbours' put in; beyond the ends there are none."""
        reach = self._kernel // 2
        if self._pooling == "max":
            return pad(votes, (reach, reach), value=-torch.inf).unfold(1, self._kernel, 1).amax(2)
        return pad(votes, (reach, reach)).unfold(1, self._kernel, 1).mean(2)

    def make_way(self, layer: int, q: Tensor, slots: Tensor, past: Tensor, cap: Tensor) -> None:
        """Nobody leaves after the prompt."""

    def release(self, slot: int) -> None:
        super().release(slot)
        self._evicted[:, slot] = 0
