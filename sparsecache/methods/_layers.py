"""State with a part for each layer, on the device where the layer lies: what the methods' caches are made of.

A model on one device has plain tensors; one that is split (`Shape.devices`) has a tensor for each layer instead.

One number is set by `x[layer, slot].fill_(number)`: `x[layer, slot] = number` would copy it from the host, and wait for
the device.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsecache.methods._host import check_host_room, make_room


class Layered:
    """Tensors of the same size, one for each layer, used as one of [layers, ...]: the first index picks the layer.

    x[layer], x[layer, ...] and x[layer, ...] = value work on that layer's device; x[:, ...] gathers all layers on the
    CPU, and x[:, ...] = number, for whole numbers and slices, fills every layer.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = parts

    def __getitem__(self, index: Any) -> Tensor:
        layer, rest = _apart(index)
        if isinstance(layer, int):
            return self._parts[layer][rest]
        return torch.stack([part[rest].to("cpu") for part in self._parts[layer]])

    def __setitem__(self, index: Any, value: Any) -> None:
        layer, rest = _apart(index)
        if isinstance(layer, int):
            self._parts[layer][rest] = value
            return
        for part in self._parts[layer]:
            part[rest].fill_(value)


PerLayer = Tensor | Layered


def per_layer(
    devices: Sequence[torch.device], *size: int, dtype: torch.dtype = torch.int64, fill: int = 0, offload: bool = False
) -> PerLayer:
    """[layers, *size] filled with a number, the i-th layer on the i-th device; one tensor where that is one device.

    With `offload` it is zeros in host memory, which all devices reach (methods/_host.py).
    """
    if offload:
        return make_room(len(devices), *size, dtype=dtype, device=_first(devices), offload=True)
    if len(set(devices)) <= 1:
        return torch.full((len(devices), *size), fill, device=_first(devices), dtype=dtype)
    return Layered([torch.full(size, fill, device=device, dtype=dtype) for device in devices])


def keys_and_values(
    devices: Sequence[torch.device], *size: int, dtype: torch.dtype, offload: bool = False
) -> tuple[PerLayer, PerLayer]:
    """Room for keys and for values, [layers, *size] each: where host memory has not enough for both, for neither."""
    if offload:
        check_host_room(2 * len(devices) * math.prod(size) * dtype.itemsize)
    keys, values = (per_layer(devices, *size, dtype=dtype, offload=offload) for _ in range(2))
    return keys, values


def spread(value: Tensor, devices: Sequence[torch.device]) -> PerLayer:
    """A tensor [layers, ...], its i-th layer on the i-th device."""
    if len(set(devices)) <= 1:
        return value.to(devices[0]) if devices else value
    return Layered([part.to(device) for part, device in zip(value, devices, strict=True)])


class Marks:
    """What counters [layers, slots, ..] held before a step, so that a slot can forget the step again.

    Of a model on one device alone: where it is split, no step is a graph, and none goes too far.
    """

    def __init__(self, counters: Sequence[PerLayer]) -> None:
        self._marked = [(counter, torch.zeros_like(counter)) for counter in counters if isinstance(counter, Tensor)]

    def take(self) -> None:
        """Remembers what the counters hold now."""
        for counter, mark in self._marked:
            torch.add(counter, 0, out=mark)  # a kernel, as the one behind it in a graph expects before it

    def restore(self, slot: int) -> None:
        """Of a slot they hold that again."""
        for counter, mark in self._marked:
            counter[:, slot] = mark[:, slot]


class Everywhere:
    """A tensor that every layer reads: a copy on each device."""

    def __init__(self, value: Tensor, devices: Sequence[torch.device]) -> None:
        copies = [value.to(device) for device in set(devices)]
        self._copies = {copy.device: copy for copy in copies}  # which says cuda:0 where the device says cuda

    def on(self, tensor: Tensor) -> Tensor:
        """The copy that lies where `tensor` does."""
        return self._copies[tensor.device]


def _first(devices: Sequence[torch.device]) -> torch.device:
    return devices[0] if devices else torch.device("cpu")


def _apart(index: Any) -> tuple[int | slice, Any]:
    layer, *rest = index if isinstance(index, tuple) else (index,)
    return layer, tuple(rest) or ...
