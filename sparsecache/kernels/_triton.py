"""Triton where it can run, and stand-ins under its names where it cannot, so that kernels' files import anywhere.

It is imported only where it is of use: with a CUDA device, or under TRITON_INTERPRET=1 (the tests), which runs
kernels on the CPU, slowly.
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

_forced: Literal["kernels", "twins"] | None = None


def fast(x: Tensor) -> bool:
    """Whether a tensor goes through kernels."""
    return in_kernels(x.device)


def in_kernels(device: torch.device) -> bool:
    """Whether tensors of a device go through kernels: those of a CUDA device do, unless `running` says otherwise."""
    if _forced is not None:
        return _forced == "kernels"
    return AVAILABLE and device.type == "cuda"


@contextmanager
def running(which: Literal["kernels", "twins"]) -> Iterator[None]:
    """Makes every kernel, or every plain torch twin, run within, whatever the device: to compare them."""
    global _forced
    before, _forced = _forced, which
    try:
        yield
    finally:
        _forced = before


@functools.cache
def launching() -> dict[str, Any]:
    """What the kernels of a step are launched with: whether they may be set up while the kernel before still runs.

    That is programmatic dependent launch, from Hopper on. Such a kernel calls `after_previous` before it reads, or
    writes, what another one touches.
    """
    nvidia = AVAILABLE and not INTERPRETED and torch.version.hip is None
    early = nvidia and torch.cuda.get_device_capability() >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@functools.cache
def is_roomy(device: torch.device) -> bool:
    """Whether a program can have 160 KiB of shared memory; GPUs of compute capability 8.6, 8.9 and 12 give it 99."""
    if device.type != "cuda":
        return True
    capability = torch.cuda.get_device_capability(device)
    return capability not in ((8, 6), (8, 9)) and capability < (12, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; through the interpreter 6."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 6


def many_programs(device: torch.device) -> int:
    """As many as keep a GPU busy that read from memory: two for each multiprocessor."""
    return 2 * multiprocessors(device)


def up_to_power(number: int, least: int = 1) -> int:
    """The next power of two from `number` on, and from `least` on: the size of a block."""
    return max(least, 1 << (number - 1).bit_length())


@triton.jit
def after_previous(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Waits until all that earlier kernels write can be read."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def before_next(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """The kernel after this one may be set up from here on; it waits itself for what this one still writes."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
