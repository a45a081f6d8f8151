"""Fake devices on the CPU that no operation may mix, to test a model that is split over several GPUs.

A real tensor on `torch.device("cpu", 1)` forgets the number. Inside `FakeDevices` a tensor that is made on such a
device, or moved to it, is a wrapper that keeps it. An operation over two devices raises, as it does with CUDA.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")


class FakeDevices(TorchDispatchMode):
    """Records every copy from one device to another in `crossings`."""

    def __init__(self) -> None:
        super().__init__()
        self.crossings: list[tuple[torch.device, torch.device]] = []
        self._literals = _Literals()

    def __enter__(self) -> "FakeDevices":
        super().__enter__()
        self._literals.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._literals.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        found = [leaf for leaf in _leaves((args, *kwargs.values())) if isinstance(leaf, Tensor)]
        here = {_device(tensor) for tensor in found if tensor.dim() or isinstance(tensor, _Tagged)}
        target = kwargs.get("device")
        crosses = func.overloadpacket in (torch.ops.aten.to, torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if len(here) > 1 and not crosses:
            raise RuntimeError(f"{func} got tensors on {', '.join(sorted(map(str, here)))}.")
        if target is not None:
            kwargs["device"] = CPU
        if crosses and target is not None and here and here != {target}:
            self.crossings.append((*here, target))
        out = func(*_map(_inner, args), **{name: _map(_inner, value) for name, value in kwargs.items()})
        place = target if target is not None else (_device(found[0]) if found else CPU)
        if place.index is None:
            return out
        with torch.inference_mode(False):  # else a tensor that was made outside that mode could not be viewed inside
            return _map(lambda x: _Tagged(x, place) if isinstance(x, Tensor) else x, out)


class _Literals(TorchFunctionMode):
    """Lets `torch.tensor` and `tolist` handle wrappers, which torch does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist:
            return _inner(args[0]).tolist()
        device = kwargs.pop("device", None) if func is torch.tensor else None
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


class _Tagged(Tensor):
    """A CPU tensor that reports another device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> "_Tagged":
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=device,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on a fake device outside FakeDevices.")


def _map(function: Callable[[Any], Any], x: Any) -> Any:
    """Map the leaves of lists and tuples, several times as fast as torch's pytrees."""
    return type(x)(_map(function, each) for each in x) if isinstance(x, list | tuple) else function(x)


def _leaves(x: Any) -> Iterator[Any]:
    if isinstance(x, list | tuple):
        for each in x:
            yield from _leaves(each)
    else:
        yield x


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, _Tagged) else x


def _device(tensor: Tensor) -> torch.device:
    return tensor.device if isinstance(tensor, _Tagged) else CPU
