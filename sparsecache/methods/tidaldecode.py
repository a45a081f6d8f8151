"""TidalDecode: Position Persistent Sparse Attention (ICLR'25, arXiv 2410.05076): a few layers select for the rest.

The first layer after the dense ones, and one later layer, attend to every token and select those of highest score. The
layers after each of them attend to its selection.

GQA: the paper's kernels select per KV head. Here a token's score for a KV head is how near it comes to the best score
of one of the head's queries, as `oracle`.

Differences: the authors give the second selecting layer per model. By default it is as deep as in their LongBench
runs, at layer 13 of 32. Their periodic correction of keys and values by full attention is left out.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from sparsecache.cache.base import CacheConfig, Shape, StepBytes
from sparsecache.cache.selection import SelectionCache
from sparsecache.kernels.threshold import Selection
from sparsecache.methods.oracle import Oracle

_DEPTH = 13 / 32


@dataclass
class TidalDecode(Oracle):
    """Selects in two layers, by true scores, for the layers after them."""

    shares_selection: ClassVar[bool] = True

    reselection_layer: Annotated[int | None, "layer that selects again; none: 13/32 of the layers"] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._selection: Selection | None = None  # of the latest selecting layer in this step

    def check(self, shape: Shape) -> None:
        super().check(shape)
        again = self.reselection_layer
        if again is not None and not self.dense_layers < again < shape.layers:
            raise ValueError(
                f"reselection_layer={again} must be {self.dense_layers + 1} to {shape.layers - 1}, a layer of this "
                f"model after layer {self.dense_layers}, which selects first."
            )

    def make_sparse_cache(self, layer: int, config: CacheConfig) -> SelectionCache:
        again = self.reselection_layer
        again = round(config.shape.layers * _DEPTH) if again is None else again
        kind = SelectingCache if layer in (self.dense_layers, again) else SelectionCache
        return kind(self, layer, config)

    def select(self, q: Tensor, cache: SelectionCache, slots: Tensor) -> Selection:
        if isinstance(cache, SelectingCache):
            self._selection = super().select(q, cache, slots)
        assert self._selection is not None, "the first sparse layer selects"
        if self._selection.counts.device != q.device:  # of a model split over several devices
            self._selection = Selection(*(part.to(q.device) for part in self._selection))
        return self._selection

    def selection_nbytes(self, config: CacheConfig, seq_len: float) -> float:
        return 0.0


class SelectingCache(SelectionCache):
    """The cache of a layer that attends to every token and selects for the layers after it."""

    sparse: ClassVar[bool] = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        self.method.select(q, self, slots)
        return self.full.attend(q, k, v, slots)

    def step_nbytes(self, seq_len: float, attended: float, cache_hit: float = 0.0) -> StepBytes:
        return self.full.step_nbytes(seq_len, attended)
