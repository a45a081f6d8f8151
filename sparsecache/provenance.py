"""Where a number comes from: what run.json records of one process."""

import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sparsecache.settings import Settings
from sparsecache.versions import installed_versions

_PROJECT = Path(__file__).resolve().parent.parent


def new_session(settings: Settings, devices: Sequence[torch.device], source: dict[str, Any]) -> dict[str, Any]:
    """A process's entry in run.json; `ended` and what its engine tells of itself are filled in as it goes."""
    return {
        "id": f"{time.time_ns()}-{platform.node()}",
        "argv": sys.argv,
        "started": now(),
        "ended": None,
        "versions": {"python": platform.python_version(), **installed_versions()},
        "commit": _commit(),
        "device": str(devices[0]),
        "gpu": None if settings.on_ray else gpu_name(devices),
        "gpus_per_worker": settings.gpus_per_worker,
        "batch_size": settings.slots(devices[0].type),
        "max_samples": settings.max_samples,
        "data": source,
        "clock": None,
    }


def gpu_name(devices: Sequence[torch.device]) -> str | None:
    """The name of the GPU that decodes, with how many there are if the model is split; None for a CPU."""
    if devices[0].type != "cuda":
        return None
    name: str = torch.cuda.get_device_name(devices[0])
    return name if len(devices) == 1 else f"{len(devices)} x {name}"


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _commit() -> str | None:
    """The commit this code was run from, with "+" if the tree has changes or new files; None outside a clone."""
    if not (_PROJECT / ".git").exists():
        return None
    try:
        commit = _git("rev-parse", "HEAD")
        return f"{commit}+" if _git("status", "--porcelain") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    told = subprocess.run(["git", *arguments], cwd=_PROJECT, capture_output=True, text=True, timeout=10, check=True)
    return told.stdout.strip()
