"""The base class of methods in which a few layers select for the layers after them."""

from abc import abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsecache.cache.base import CacheConfig, Shape, StepBytes
from sparsecache.cache.selection import SelectionCache, SelectionMethod
from sparsecache.kernels.threshold import Selection


@dataclass
class SharedSelectionMethod(SelectionMethod):
    """Some layers attend to every token and select; the layers after each of them attend to its selection.

    The first layer after the dense ones must select. A subclass defines `selecting_layers` and `select_shared`.
    """

    shares_selection: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._selection: Selection | None = None  # selection of the latest selecting layer in this step

    @abstractmethod
    def selecting_layers(self, shape: Shape) -> Collection[int]:
        """Return the layers that select."""

    @abstractmethod
    def select_shared(self, q: Tensor, cache: SelectionCache, slots: Tensor) -> Selection:
        """Return what the layers after this one attend to; as `select`."""

    def make_sparse_cache(self, layer: int, config: CacheConfig) -> SelectionCache:
        kind = SelectingCache if layer in self.selecting_layers(config.shape) else SelectionCache
        return kind(self, layer, config)

    def select(self, q: Tensor, cache: SelectionCache, slots: Tensor) -> Selection:
        if isinstance(cache, SelectingCache):
            self._selection = self.select_shared(q, cache, slots)
        assert self._selection is not None, "the first sparse layer selects"
        if self._selection.counts.device != q.device:  # the model is split over several devices
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
