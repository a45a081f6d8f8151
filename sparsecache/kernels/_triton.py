"""Import Triton where it can run, else define stand-ins, so that kernel files always import.

Triton is imported only if a CUDA device is present, or under TRITON_INTERPRET=1, where its interpreter runs kernels on
the CPU. The interpreter is slow; the tests use it.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

triton: Any = SimpleNamespace(jit=lambda kernel=None, **_: kernel or (lambda each: each))
tl: Any = SimpleNamespace(constexpr=int)
AVAILABLE = (INTERPRETED or torch.cuda.is_available()) and find_spec("triton") is not None
if AVAILABLE:
    triton, tl = import_module("triton"), import_module("triton.language")

Backend = Literal["kernels", "reference"]
_forced: Backend | None = None


def use_kernel(x: Tensor) -> bool:
    """Return whether operations on a tensor use kernels."""
    return uses_kernels(x.device)


def uses_kernels(device: torch.device) -> bool:
    """Return whether operations on a device use kernels: on CUDA, unless `force_backend` is set."""
    if _forced is not None:
        return _forced == "kernels"
    return AVAILABLE and device.type == "cuda"


@contextmanager
def force_backend(backend: Backend) -> Iterator[None]:
    """Use kernels, or their references, on every device within the context; for tests."""
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


@functools.cache
def pdl_options() -> dict[str, Any]:
    """Return launch options that enable programmatic dependent launch, on Hopper and later GPUs.

    With it a kernel may start while the kernel before it still runs. Each such kernel must call `pdl_wait` before it
    reads or writes memory that another kernel uses. It may read a norm's weights before, since no kernel of this
    package writes them.
    """
    nvidia = AVAILABLE and not INTERPRETED and torch.version.hip is None
    supported = nvidia and torch.cuda.get_device_capability() >= (9, 0)
    return {"USE_PDL": True, "launch_pdl": True} if supported else {"USE_PDL": False}


@functools.cache
def has_large_shared_memory(device: torch.device) -> bool:
    """Return whether a program can use 160 KiB of shared memory."""
    # Compute capability 8.6, 8.9 and 12 allow 99 KiB.
    if device.type != "cuda":
        return True
    capability = torch.cuda.get_device_capability(device)
    return capability not in ((8, 6), (8, 9)) and capability < (12, 0)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Return the number of streaming multiprocessors of a GPU."""
    # 6 for the interpreter, so that tests run several programs.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 6


def saturating_programs(device: torch.device) -> int:
    """Return how many programs saturate the memory bandwidth of a GPU: two per multiprocessor."""
    return 2 * num_sms(device)


def next_power_of_2(number: int, minimum: int = 1) -> int:
    """Return the smallest power of two that is at least `number` and `minimum`."""
    return max(minimum, 1 << (number - 1).bit_length())


@triton.jit
def pdl_wait(USE_PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait until the writes of all earlier kernels are visible."""
    if USE_PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def pdl_launch(USE_PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Allow the next kernel to start. Its own `pdl_wait` still waits for the writes of this one.

    Call it after `pdl_wait`, so that the next kernel cannot start before the writes of earlier ones are visible.
    """
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def sortable(x):  # type: ignore[no-untyped-def]
    """Map float32 to int32 in the same order, -0.0 to the same as 0.0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
