"""Record in run.json how one process worked: versions, commit, device, command line."""

import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sparsecache.engine.devices import gpu_name
from sparsecache.runner.settings import Settings
from sparsecache.versions import installed_versions

_PROJECT = Path(__file__).resolve().parent.parent.parent


def new_session(settings: Settings, devices: Sequence[torch.device], source: dict[str, Any]) -> dict[str, Any]:
    """Return a process's entry in run.json. The caller fills in `ended` and what the engine reports."""
    return {
        "id": f"{time.time_ns()}-{platform.node()}",
        "argv": sys.argv,
        "started": now(),
        "ended": None,
        "versions": {"python": platform.python_version(), **installed_versions()},
        "commit": code_commit(),
        "device": str(devices[0]),
        "gpu": None if settings.on_ray else gpu_name(devices),
        "gpus_per_worker": settings.gpus_per_worker,
        "batch_size": settings.slots(devices[0].type),
        "max_samples": settings.max_samples,
        "data": source,
        "clock": None,
    }


def now() -> str:
    """Return the time in UTC, to the second, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache  # a process may record many runs
def code_commit() -> str | None:
    """Return the commit of this code, with "+" if code is changed or new; None outside a clone.

    Code is what lies in sparsecache/, and every Python file. Results in the clone do not count.
    """
    commit = _git("rev-parse", "HEAD")
    return f"{commit}+" if commit and _git("status", "--porcelain", "--", "sparsecache", "*.py") else commit


def _git(*arguments: str) -> str | None:
    """Return what git prints about this code; None outside a clone, or if git fails or is missing."""
    if not (_PROJECT / ".git").exists():
        return None
    try:
        output = subprocess.run(["git", *arguments], cwd=_PROJECT, capture_output=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return output.decode(errors="replace").strip()
