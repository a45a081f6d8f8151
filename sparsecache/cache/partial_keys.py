"""Selection by partial keys: each key's projection to a few channels by a calibrated matrix.

Loki and Double Sparsity differ only in the matrix.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig, Shape
from sparsecache.cache.calibration import check_matrices, read_calibration_text
from sparsecache.cache.selection import SelectionCache, SelectionMethod
from sparsecache.kernels.speculation import speculated_scores
from sparsecache.kernels.threshold import Selection
from sparsecache.options import FilePath

_BLOCK = 16384  # prompt tokens that are projected at a time


@dataclass
class PartialKeyMethod(SelectionMethod):
    """Selects by the scores of partial queries and keys: a subclass defines `projection`.

    A KV head selects the tokens of largest score margin, as `oracle`.
    """

    channels: Annotated[float, "channels that score tokens: a share of them up to 1, else a count"] = 0.25
    calibration_file: Annotated[FilePath | None, "text file that the projections are made of; none: bundled"] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_channels(self.channels)
        self._projections: list[Tensor] = []

    @abstractmethod
    def projection(self, q: Tensor, k: Tensor) -> Tensor:
        """Return a matrix per KV head whose first columns are the most important channels: [G, D, D].

        q: [G, H / G, L, D]; k: [G, L, D], rotated, over the calibration text. The matrix must be orthogonal, so that
        all channels together give the true scores. It must not depend on options.
        """

    def check(self, shape: Shape) -> None:
        super().check(shape)
        check_channels(self.channels, shape.head_dim)

    def calibration_text(self) -> str:
        return read_calibration_text(self.calibration_file)

    def calibrate(self, layer: int, q: Tensor, k: Tensor) -> None:
        self._projections[layer:] = [self.projection(q, k).float().cpu()]

    def calibration(self) -> dict[str, Tensor]:
        return {"projection": torch.stack(self._projections)}

    def restore(self, calibration: dict[str, Tensor], shape: Shape) -> None:
        self._projections = list(check_matrices("projection", calibration.get("projection"), shape))

    def make_sparse_cache(self, layer: int, config: CacheConfig) -> "PartialKeyCache":
        if len(self._projections) != config.shape.layers:
            raise RuntimeError("The method must be calibrated before it takes a prompt.")
        count = channel_count(self.channels, config.shape.head_dim)
        return PartialKeyCache(self, layer, config, self._projections[layer][:, :, :count])

    def select(self, q: Tensor, cache: SelectionCache, slots: Tensor) -> Selection:
        assert isinstance(cache, PartialKeyCache)
        scores = speculated_scores(q, cache.projection, cache.partial_keys, cache.seq_lens, slots)
        return cache.select_near_best(scores, slots)

    def selection_nbytes(self, config: CacheConfig, seq_len: float) -> float:
        head_dim = config.shape.head_dim
        return seq_len * config.token_nbytes / 2 * channel_count(self.channels, head_dim) / head_dim


class PartialKeyCache(SelectionCache):
    """All keys and values, and the partial keys.

    projection: [slots, G, D, I] float32, the same for all slots; partial_keys: [slots, G, T, I].
    """

    def __init__(self, method: PartialKeyMethod, layer: int, config: CacheConfig, projection: Tensor) -> None:
        """projection: [G, D, I] float32."""
        super().__init__(method, layer, config)
        self.projection = projection.to(config.device).expand(config.slots, -1, -1, -1).contiguous()
        self.partial_keys = config.zeros(config.max_tokens, projection.shape[2])

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        super().prefill(slot, q, k, v)
        for start in range(0, k.shape[1], _BLOCK):
            block = k[:, start : start + _BLOCK].float() @ self.projection[slot]
            self.partial_keys[slot, :, start : start + block.shape[1]] = block

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        out = super().attend(q, k, v, slots)
        with self.config.deferred.reading(k, slots):
            row = self.seq_lens[slots].clamp(max=self.config.max_tokens - 1)
            partial = k.float() @ self.projection[slots]  # [B, G, 1, I]
            self.partial_keys[slots, :, row] = partial[:, :, 0].to(self.partial_keys.dtype)
        return out


def check_channels(channels: float, head_dim: int | None = None) -> None:
    """Raise ValueError if an option means no number of a head's channels: a share up to 1, else a count."""
    if not (0 < channels <= 1 or (1 < channels < math.inf and channels == math.floor(channels))):
        raise ValueError(f"channels={channels} must be a share above 0 up to 1, or a whole number of channels.")
    if head_dim is not None and channels > head_dim:
        raise ValueError(f"channels={channels:g} must be at most {head_dim}, the channels of a head of this model.")


def channel_count(channels: float, head_dim: int) -> int:
    """Return how many of a head's channels an option means, 1 or more."""
    return max(1, math.floor(channels * head_dim + 1e-6)) if channels <= 1 else min(int(channels), head_dim)
