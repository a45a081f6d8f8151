"""Starts the Ray workers of a run: what each loads, and what it compares with the driver before."""

import os
import platform
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsecache.cluster.connection import Cluster
from sparsecache.cluster.worker import Worker, WorkerConfig
from sparsecache.cluster.workers import PoolSize, Workers
from sparsecache.engine.base import Engine
from sparsecache.errors import UsageError
from sparsecache.runner.context import RunContext
from sparsecache.runner.settings import Settings
from sparsecache.versions import installed_versions


@dataclass(frozen=True)
class EngineLoader:
    """Loads a run's engine in a worker's process.

    identity, versions: the driver's, which the worker must find too. most_rows: the rows of the largest dataset.
    """

    settings: Settings
    identity: dict[str, Any]
    versions: dict[str, str]
    most_rows: int

    def __call__(self) -> tuple[Engine, list[torch.device]]:
        """Returns the engine and its devices. Raises UsageError if code, files or devices differ from the driver's."""
        node = platform.node()
        advice = "Install the same on every machine."
        _check_equal(self.versions, installed_versions(), f"The versions on {node}", advice)
        context = RunContext(replace(self.settings, workers=1, ray_address=None))
        context.fetch_weights()
        advice = "Give every machine the same clone and the same checkpoint, at the same path."
        _check_equal(self.identity, context.identity(), f"The run on {node}", advice)
        return context.engine(self.most_rows), context.devices


def check_capacity(cluster: Cluster, settings: Settings) -> None:
    """Connects. Raises UsageError if there is no cluster, or if it has too few GPUs or CPUs."""
    cluster.connect()
    _size(settings).check_fits(cluster)


def start_workers(cluster: Cluster, settings: Settings, identity: dict[str, Any], most_rows: int) -> Workers:
    """Starts the workers that the settings ask for. Raises UsageError as `check_capacity`."""
    check_capacity(cluster, settings)
    size = _size(settings)
    stated = os.environ.get("OMP_NUM_THREADS", "")  # per process: several runs may share the cluster
    sharing = size.workers if size.kind == "CPU" else cluster.total("GPU") // size.per_worker
    threads = int(stated) if stated.isdecimal() and int(stated) else cluster.threads(sharing)
    loader = EngineLoader(settings, identity, installed_versions(), most_rows)
    slots = min(settings.slots(settings.device), most_rows)
    return Workers(cluster, WorkerConfig(loader, threads, os.getcwd()), size, slots, Worker)


def _size(settings: Settings) -> PoolSize:
    if settings.device == "cuda":
        return PoolSize(settings.workers, "GPU", settings.gpus_per_worker)
    return PoolSize(settings.workers, "CPU")


def _check_equal(wanted: dict[str, Any], found: dict[str, Any], what: str, advice: str) -> None:
    differing = [f"{key} is {found.get(key)}, not {value}" for key, value in wanted.items() if found.get(key) != value]
    if differing:
        raise UsageError(f"{what} differs from the driver's: {'; '.join(differing)}. {advice}")
