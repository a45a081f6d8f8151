"""The transformers caches of the sequences in flight, and their union for a batch.

Full-attention layers are delegated to the caches of a method, so they hold nothing here. Layers with a sliding window
keep transformers' own cache. In a batch, sequences of different lengths are aligned at their newest token: there is
padding before the shorter ones, which a mask hides.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer


class DelegatedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """Counts a layer's tokens and hands the new ones on; the attention function stores them in a LayerCache."""

    is_sliding = False

    def __init__(self, num_tokens: int = 0) -> None:
        super().__init__()
        self.num_tokens = num_tokens

    def lazy_initialization(self, *tensors: Tensor) -> None:
        """Do nothing: the LayerCache is allocated."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new tokens alone."""
        self.num_tokens += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self, *args: Any) -> int:
        """Return how many tokens the layer was given."""
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens a mask is for, and which is the first."""
        return self.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: no limit of its own."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20


class SequenceCaches:
    """The transformers cache of each slot's sequence, or one cache of the batch that was decoded last.

    config: the model's. delegated: the indices of the full-attention layers. device: of attention masks.
    """

    def __init__(self, config: Any, delegated: Iterable[int], device: torch.device) -> None:
        self._config, self._delegated, self._device = config, frozenset(delegated), device
        self._by_slot: dict[int, Cache] = {}
        self._batch: Cache | None = None
        self._slots: tuple[int, ...] = ()
        self._padding: list[int] = []  # padding positions before the first token, per slot of the batch

    @property
    def can_join(self) -> bool:
        """Return whether sequences can be decoded together: all layers are delegated or have a sliding window."""
        layers = enumerate(DynamicCache(config=self._config).layers)
        return all(type(layer) is DynamicSlidingWindowLayer for at, layer in layers if at not in self._delegated)

    def start(self, slot: int) -> Cache:
        """Return an empty cache for the prompt of a slot."""
        self._split()
        past = self._by_slot[slot] = DynamicCache(config=self._config)
        for index in self._delegated:
            past.layers[index] = DelegatedLayer()
        return past

    def of(self, slots: tuple[int, ...]) -> tuple[Cache, Tensor | None]:
        """Return the cache for the next step of slots, and its attention mask [B, tokens], if it needs one."""
        if slots != self._slots:
            self._split()
        if len(slots) == 1:
            return self._by_slot[slots[0]], None
        if self._batch is None:
            self._join(slots)
        assert self._batch is not None
        if len(self._delegated) == len(self._batch.layers):
            return self._batch, None
        positions = torch.arange(self._batch.get_seq_length() + 1, device=self._device)
        return self._batch, (positions >= torch.tensor(self._padding, device=self._device)[:, None]).long()

    def _join(self, slots: tuple[int, ...]) -> None:
        rows = [self._by_slot[slot] for slot in slots]
        lengths = [row.get_seq_length() for row in rows]
        self._slots, self._padding = slots, [max(lengths) - length for length in lengths]
        self._batch = copy.copy(rows[0])
        self._batch.layers = [
            DelegatedLayer(max(lengths)) if index in self._delegated else _join_windows(layers)
            for index, layers in enumerate(zip(*(row.layers for row in rows), strict=True))
        ]

    def _split(self) -> None:
        """Give each sequence of the batch its own cache again."""
        if self._batch is None:
            return
        for row, (slot, padding) in enumerate(zip(self._slots, self._padding, strict=True)):
            length = self._batch.get_seq_length() - padding
            past = self._by_slot[slot] = copy.copy(self._batch)
            past.layers = [
                DelegatedLayer(length) if index in self._delegated else _split_window(layer, row, length)
                for index, layer in enumerate(self._batch.layers)
            ]
        self._batch, self._slots = None, ()


def _join_windows(layers: tuple[DynamicSlidingWindowLayer, ...]) -> DynamicSlidingWindowLayer:
    """Return one layer of several sequences, padded on the left."""
    joined = copy.copy(layers[0])
    tokens = max(layer.keys.shape[2] for layer in layers)
    for name in ("keys", "values"):
        parts = [getattr(layer, name) for layer in layers]
        setattr(joined, name, torch.cat([pad(part, (0, 0, tokens - part.shape[2], 0)) for part in parts]))
    joined.cumulative_length = max(layer.cumulative_length for layer in layers)
    return joined


def _split_window(layer: DynamicSlidingWindowLayer, row: int, length: int) -> DynamicSlidingWindowLayer:
    """Return the layer of one sequence of `length` tokens, without padding."""
    own = copy.copy(layer)
    own.keys, own.values = (part[row : row + 1, :, -length:] for part in (layer.keys, layer.values))
    own.cumulative_length = length
    return own
