"""Where a number comes from: what run.json records of one process."""

import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sparsecache.settings import Settings
from sparsecache.versions import installed_versions

_PROJECT = Path(__file__).resolve().parent.parent


def new_session(settings: Settings, device: torch.device, source: dict[str, Any]) -> dict[str, Any]:
    """A process's entry in run.json; `ended` and what its engine tells of itself are filled in as it goes."""
    return {
        "id": f"{time.time_ns()}-{platform.node()}",
        "argv": sys.argv,
        "started": now(),
        "ended": None,
        "versions": {"python": platform.python_version(), **installed_versions()},
        "commit": _commit(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" and not settings.on_ray else None,
        "batch_size": settings.batch_size,
        "max_samples": settings.max_samples,
        "data": source,
        "clock": None,
    }


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
