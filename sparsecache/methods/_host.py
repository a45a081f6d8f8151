"""Memory for keys and values: on the device, or in host memory that the device reads and writes by itself."""

import contextlib
import ctypes
import math
import weakref
from pathlib import Path

import torch
from torch import Tensor

_GIB = 2**30
_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE: pinned for all GPUs
_pinned = 0
_CGROUP = Path("/sys/fs/cgroup")


def make_room(*size: int, dtype: torch.dtype, device: torch.device, offload: bool = False) -> Tensor:
    """Zeros on the device; with `offload`, in host memory, pinned where the device is a GPU.

    Host memory is pinned where it lies, since torch's own pinned allocator takes up to twice what is asked for. Raises
    torch.OutOfMemoryError, with the numbers, where the host has not enough.
    """
    if not offload:
        return torch.zeros(size, device=device, dtype=dtype)
    needed = math.prod(size) * dtype.itemsize
    check_host_room(needed)
    room = torch.zeros(size, dtype=dtype)
    if device.type == "cuda" and needed:
        torch.cuda.synchronize(device)  # makes this thread one that the driver knows
        _pin(room)
    return room


def check_host_room(needed: int) -> None:
    """Raises torch.OutOfMemoryError, with the numbers, where the host has not so many bytes."""
    free = _available()
    if free is not None and needed > free:
        raise torch.OutOfMemoryError(
            f"offload needs {needed / _GIB:.1f} GiB of host memory, and {free / _GIB:.1f} GiB are available. Decode "
            f"fewer or shorter sequences at a time."
        )


def put(rows: Tensor, target: Tensor) -> None:
    """Copies rows [G, L, ..] to the first L of target [G, T, ..], which may lie in pinned host memory."""
    if target.device == rows.device:
        target[:, : rows.shape[1]].copy_(rows)
        return
    for of_head, to_head in zip(rows, target, strict=True):  # each is whole memory, as copies over a link should be
        to_head[: len(of_head)].copy_(of_head, non_blocking=True)


def pinned_bytes() -> int:
    """Host memory that is pinned for keys and values now: what was asked for, since it is pinned where it lies."""
    return _pinned


def _pin(tensor: Tensor) -> None:
    """By the driver: the runtime would keep an error, and raise it at the next call that has nothing to do with it."""
    global _pinned
    driver, pointer = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(tensor.data_ptr())
    if code := driver.cuMemHostRegister_v2(pointer, ctypes.c_size_t(tensor.nbytes), _PORTABLE):
        raise torch.OutOfMemoryError(
            f"{tensor.nbytes / _GIB:.1f} GiB of host memory could not be pinned (the driver's error {code})."
        )
    _pinned += tensor.nbytes
    weakref.finalize(tensor.untyped_storage(), _unpin, driver, pointer, tensor.nbytes)


def _unpin(driver: ctypes.CDLL, pointer: ctypes.c_void_p, size: int) -> None:
    global _pinned
    driver.cuMemHostUnregister(pointer)
    _pinned -= size


def _available() -> int | None:
    """Bytes that the host, or the container on it, can still give, where that is said."""
    said = [available for available in (_of_host(), _of_container()) if available is not None]
    return min(said, default=None)


def _of_host() -> int | None:
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo", encoding="ascii") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")), None)
    return None


def _of_container() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        most, used = ((_CGROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        return max(0, int(most) - int(used))  # "max", which is no number, is no limit
    return None
