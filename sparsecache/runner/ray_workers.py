"""Start the Ray workers of a run."""

import os
from typing import Any

from sparsecache.cluster.connection import Cluster
from sparsecache.cluster.worker import Worker, WorkerConfig
from sparsecache.cluster.workers import PoolSize, Workers
from sparsecache.runner.engine_loader import EngineLoader
from sparsecache.runner.settings import Settings
from sparsecache.versions import installed_versions


def check_capacity(cluster: Cluster, settings: Settings) -> None:
    """Connect. Raises UsageError if there is no cluster, or if it has too few GPUs or CPUs."""
    cluster.connect()
    _size(settings).check_fits(cluster)


def start_workers(cluster: Cluster, settings: Settings, identity: dict[str, Any], max_rows: int) -> Workers:
    """Start the workers that the settings ask for. Raises UsageError as `check_capacity`."""
    check_capacity(cluster, settings)
    size = _size(settings)
    stated = os.environ.get("OMP_NUM_THREADS", "")  # per process: several runs may share the cluster
    num_workers = size.workers if size.kind == "CPU" else cluster.total("GPU") // size.per_worker
    threads = int(stated) if stated.isdecimal() and int(stated) else cluster.threads(num_workers)
    loader = EngineLoader(settings, identity, installed_versions(), max_rows)
    slots = min(settings.slots(settings.device), max_rows)
    return Workers(cluster, WorkerConfig(loader, threads, os.getcwd()), size, slots, Worker)


def _size(settings: Settings) -> PoolSize:
    if settings.device == "cuda":
        return PoolSize(settings.workers, "GPU", settings.gpus_per_worker)
    return PoolSize(settings.workers, "CPU")
