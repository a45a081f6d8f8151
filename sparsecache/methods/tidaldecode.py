"""TidalDecode: Position Persistent Sparse Attention (ICLR'25, arXiv 2410.05076): a few layers select for the rest.

The first layer after the dense ones, and one later layer, attend to every token and select those of highest score. The
layers after each of them attend to its selection.

GQA: the paper's kernels select per KV head. Here a KV head selects the tokens of largest score margin, as `oracle`.

Differences: the authors give the second selecting layer per model. By default it is as deep as in their LongBench
runs, at layer 13 of 32. Their periodic correction of keys and values by full attention is left out.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from sparsecache.cache.base import Shape
from sparsecache.cache.selection import SelectionCache
from sparsecache.cache.shared_selection import SharedSelectionMethod
from sparsecache.kernels.threshold import Selection

_DEPTH = 13 / 32


@dataclass
class TidalDecode(SharedSelectionMethod):
    """Selects in two layers, by true scores, for the layers after them."""

    prompt_queries = 0

    reselection_layer: Annotated[int | None, "layer that selects again; none: 13/32 of the layers"] = None

    def check(self, shape: Shape) -> None:
        super().check(shape)
        again = self.reselection_layer
        if again is not None and not self.dense_layers < again < shape.layers:
            raise ValueError(
                f"reselection_layer={again} must be {self.dense_layers + 1} to {shape.layers - 1}, a layer of this "
                f"model after layer {self.dense_layers}, which selects first."
            )

    def selecting_layers(self, shape: Shape) -> Collection[int]:
        again = self.reselection_layer
        return self.dense_layers, round(shape.layers * _DEPTH) if again is None else again

    def select_shared(self, q: Tensor, cache: SelectionCache, slots: Tensor) -> Selection:
        return cache.select_by_keys(q, slots)
