"""Memory for keys and values: on the device, or in pinned host memory that kernels read and write directly."""

import contextlib
import ctypes
import math
import mmap
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_GIB = 2**30
_PAGE = mmap.PAGESIZE
_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE: pinned for all GPUs
_pinned = 0
_CGROUP = Path("/sys/fs/cgroup")


def allocate(size: Sequence[int], dtype: torch.dtype, device: torch.device, offload: bool = False) -> Tensor:
    """Return zeros on the device or, with `offload`, in host memory that is pinned where the device is a GPU.

    Memory is pinned in place, since torch's pinned allocator takes up to twice the size.
    """
    if not offload or device.type != "cuda":
        return torch.zeros(size, device=device, dtype=dtype)
    nbytes = math.prod(size) * dtype.itemsize
    if not nbytes:
        return torch.zeros(size, dtype=dtype)
    memory = whole_pages(nbytes)
    torch.cuda.synchronize(device)  # initialises the driver's context for this thread
    _pin(memory)
    return memory[:nbytes].view(dtype).view(*size)


def whole_pages(nbytes: int) -> Tensor:
    """Return zeros (uint8) in memory pages of their own, at least `nbytes`: a page can be pinned once only."""
    pages = mmap.mmap(-1, -(-nbytes // _PAGE) * _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)


def check_host_memory(nbytes: int) -> None:
    """Raise torch.OutOfMemoryError, with the numbers, if the host has fewer bytes available.

    Call it with the bytes of all layers before the first one is allocated.
    """
    available = available_nbytes()
    if available is not None and nbytes > available:
        raise torch.OutOfMemoryError(
            f"offload needs {nbytes / _GIB:.1f} GiB of host memory; {available / _GIB:.1f} GiB are available. Decode "
            f"fewer or shorter sequences at a time."
        )


def copy_into(target: Tensor, rows: Tensor) -> None:
    """Copy rows [G, L, ...] to the first L rows of target [G, T, ...], which may be in pinned host memory."""
    if target.device == rows.device:
        target[:, : rows.shape[1]].copy_(rows)
        return
    for of_head, to_head in zip(rows, target, strict=True):  # contiguous copies are the fastest over the link
        to_head[: len(of_head)].copy_(of_head, non_blocking=True)


def pinned_bytes() -> int:
    """Return the bytes of host memory that are pinned for keys and values now."""
    return _pinned


def _pin(tensor: Tensor) -> None:
    """Pin by the driver: the runtime would keep an error and raise it at a later, unrelated call."""
    global _pinned
    driver, pointer = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(tensor.data_ptr())
    if code := driver.cuMemHostRegister_v2(pointer, ctypes.c_size_t(tensor.nbytes), _PORTABLE):
        raise torch.OutOfMemoryError(
            f"Could not pin {tensor.nbytes / _GIB:.1f} GiB of host memory (driver error {code})."
        )
    _pinned += tensor.nbytes
    weakref.finalize(tensor.untyped_storage(), _unpin, driver, pointer, tensor.nbytes)


def _unpin(driver: ctypes.CDLL, pointer: ctypes.c_void_p, size: int) -> None:
    global _pinned
    driver.cuMemHostUnregister(pointer)
    _pinned -= size


def available_nbytes() -> int | None:
    """Return the available bytes of the host or its container; None if unknown."""
    limits = [available for available in (_host_available(), _container_available()) if available is not None]
    return min(limits, default=None)


def _host_available() -> int | None:
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo", encoding="ascii") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")), None)
    return None


def _container_available() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        most, used = ((_CGROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        return max(0, int(most) - int(used))  # "max", which is no number, is no limit
    return None
