"""OmniKV: Dynamic Context Selection for Efficient Long-Context LLMs (ICLR'25): a few layers select for the rest.

https://openreview.net/forum?id=ulCAPXYXfa

The first layer after the dense ones, and the `filter_layers`, attend to every token and select those that get the most
attention from any query head. The layers after each of them attend to its selection.

GQA: as in the authors' code, a token's score is its highest attention over all query heads of the layer, so all KV
heads attend to the same tokens.

Differences: the authors give filter layers per model. By default they are as deep as in Llama-3-8B, layers 2, 8 and 18
of 32. The authors select prompt tokens and keep all generated ones; here the budget counts both. All tokens stay on the
device, so the layers that attend to everything while tokens are fetched are left out.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from sparsecache.cache.base import Shape
from sparsecache.cache.selection import SelectionCache, positions_below
from sparsecache.cache.shared_selection import SharedSelectionMethod
from sparsecache.kernels.scores import scaled_scores
from sparsecache.kernels.threshold import Selection

_DEPTHS = 8 / 32, 18 / 32


@dataclass
class OmniKV(SharedSelectionMethod):
    """Selects in a few layers, by the highest attention of any head, for the layers after them."""

    prompt_queries = 0

    filter_layers: Annotated[
        str | None, "further layers that select, separated by commas; none: at 8/32 and 18/32 of the layers"
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self._further = (
                None if self.filter_layers is None else [int(each) for each in self.filter_layers.split(",")]
            )
        except ValueError:
            raise ValueError(f"filter_layers={self.filter_layers} must be numbers of layers, as in 8,18.") from None
        if self._further is not None and self._further != sorted(set(self._further)):
            raise ValueError(f"filter_layers={self.filter_layers} must be in ascending order, each layer once.")

    def check(self, shape: Shape) -> None:
        super().check(shape)
        wrong = [layer for layer in self._further or () if not self.dense_layers < layer < shape.layers]
        if wrong:
            raise ValueError(
                f"filter_layers={self.filter_layers} must be {self.dense_layers + 1} to {shape.layers - 1}, layers of "
                f"this model after layer {self.dense_layers}, which selects first."
            )

    def selecting_layers(self, shape: Shape) -> Collection[int]:
        further = [int(shape.layers * depth) for depth in _DEPTHS] if self._further is None else self._further
        return self.dense_layers, *further

    def select_shared(self, q: Tensor, cache: SelectionCache, slots: Tensor) -> Selection:
        keys = cache.keys_of(slots)
        scores = scaled_scores(q, keys, keys.shape[3])[:, :, 0]  # [B, H, T]
        is_past = positions_below(cache.seq_lens[slots], scores.shape[2])
        attention = scores.masked_fill(~is_past, -math.inf).softmax(2).amax(1, keepdim=True)  # [B, 1, T]
        return cache.select_topk(attention.expand(-1, keys.shape[1], -1), slots)
