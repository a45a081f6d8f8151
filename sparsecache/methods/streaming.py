"""StreamingLLM: Efficient Streaming Language Models with Attention Sinks (ICLR'24, arXiv 2309.17453).

The first tokens, to which models send the attention that they have no use for, and the most recent ones; all others
are evicted. Nothing depends on what a token says, so all KV heads keep the same ones, and GQA adds nothing.

What differs from the paper: it numbers positions inside the cache, so that a text can go on for ever. Here keys keep
the rotation of their positions in the text, as in every method that is compared; the prompt's own attention is dense.
The budget counts sinks and recent tokens together; one of no more tokens than `sinks` holds only sinks.
"""

from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from sparsecache.methods._evicting import EvictingMethod

_SINK = 2.0**52  # above any position, and exact with one subtracted


class Streaming(EvictingMethod):
    """Keeps the first and the last tokens."""

    lossless: ClassVar[dict[str, Any] | None] = {"budget": 1.0, "dense_layers": 0}
    tight: ClassVar[dict[str, Any]] = {"budget": 6, "sinks": 2, "dense_layers": 0}

    def __init__(
        self,
        budget: Annotated[
            float, "most past tokens kept, sinks among them: a share of them up to 1, else a count"
        ] = 0.2,
        sinks: Annotated[int, "first tokens that are always kept, 0 or more"] = 4,
        dense_layers: Annotated[int, "first layers that attend to everything"] = 2,
    ) -> None:
        super().__init__(budget, dense_layers)
        if sinks < 0:
            raise ValueError(f"sinks={sinks} must be 0 tokens or more.")
        self._sinks = sinks

    def choose_prompt(self, layer: int, slot: int, q: Tensor, k: Tensor, count: int) -> Tensor:
        kv_heads, length = k.shape[:2]
        sinks = min(self._sinks, count)
        positions = torch.arange(length, device=k.device)
        return torch.cat((positions[:sinks], positions[length - count + sinks :])).expand(kv_heads, -1)

    def make_way(self, layer: int, q: Tensor, slots: Tensor, past: Tensor, cap: Tensor) -> None:
        positions = self.rows[layer].positions[slots].double()
        worth = torch.where(positions < self._sinks, _SINK - positions, positions)
        self.rows[layer].drop_least(slots, worth, cap)
