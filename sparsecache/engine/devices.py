"""Find the devices that an engine decodes on, and name them."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from sparsecache.errors import UsageError


def find_device(name: str) -> torch.device:
    """Return the device that `--device` names. Raises UsageError if torch does not see it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name!r} cannot be decoded on. Allowed: auto, cpu, cuda, cuda:<number>.")
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise UsageError(f"--device {name} does not exist: torch sees {found} GPUs. Use --device cpu.")
    return device


def find_devices(first: torch.device, count: int, option: str) -> list[torch.device]:
    """Return `count` devices, beginning with `first`. Raises UsageError, naming `option`, if torch sees fewer."""
    if count == 1:
        return [first]
    found, start = torch.cuda.device_count(), first.index or 0
    if first.type != "cuda" or start + count > found:
        raise UsageError(
            f"{option} {count} needs the GPUs {start} to {start + count - 1}: torch sees {found}. Ask for "
            f"fewer, or leave it out."
        )
    return [torch.device("cuda", start + index) for index in range(count)]


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which Triton launches kernels on a GPU; it does nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def gpu_name(devices: Sequence[torch.device]) -> str | None:
    """Return the name of the GPU, with a count if the model is split over several; None for a CPU."""
    if devices[0].type != "cuda":
        return None
    name: str = torch.cuda.get_device_name(devices[0])
    return name if len(devices) == 1 else f"{len(devices)} x {name}"


def synchronize(devices: Iterable[torch.device]) -> None:
    """Wait for all work on the GPUs among the devices."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
