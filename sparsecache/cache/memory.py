"""Measures the memory of caches: the bytes that they allocate per sequence, on the device and in host memory."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig, CacheMethod, LayerCache, Shape
from sparsecache.cache.stats import LayerStats

_SHARED = (CacheConfig, CacheMethod, LayerStats)  # not of one sequence


@dataclass(frozen=True)
class CacheMemory:
    """The bytes that the caches of all layers allocate per token that a slot has room for.

    layers: of the model. full_token_nbytes: of the full cache. token_nbytes: on the layers' devices; host_token_nbytes:
    in host memory beside a GPU. Both include what a method stores in addition, such as page bounds.
    """

    layers: int
    full_token_nbytes: int
    token_nbytes: float
    host_token_nbytes: float

    def as_json(self) -> dict[str, Any]:
        """Return the entry of a session in run.json."""
        return asdict(self)


def measure_memory(
    caches: Sequence[LayerCache],
    devices: Sequence[torch.device],
    shape: Shape,
    slots: int,
    max_tokens: int,
    dtype: torch.dtype,
) -> CacheMemory:
    """Return the memory of a model's caches; devices: of each layer. Tensors without a row per slot do not count."""
    on_device, on_host = dict[int, int](), dict[int, int]()
    for cache, device in zip(caches, devices, strict=True):
        for tensor in _tensors(cache, set()):
            if tensor.ndim and tensor.shape[0] == slots:
                storage = tensor.untyped_storage()
                (on_device if tensor.device.type == device.type else on_host)[storage._cdata] = storage.nbytes()
    tokens = slots * max_tokens
    return CacheMemory(
        layers=shape.layers,
        full_token_nbytes=shape.kv_nbytes(dtype),
        token_nbytes=round(sum(on_device.values()) / tokens, 1),
        host_token_nbytes=round(sum(on_host.values()) / tokens, 1),
    )


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors of a cache and of its parts."""
    if id(value) in seen or isinstance(value, _SHARED):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part, seen)
    elif isinstance(value, LayerCache) or is_dataclass(value) or type(value).__module__.startswith("sparsecache."):
        for part in getattr(value, "__dict__", {}).values():
            yield from _tensors(part, seen)
