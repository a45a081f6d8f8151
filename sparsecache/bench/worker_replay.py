"""The replay shared by workers, as in a run with --workers, over the bench's own models."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsecache.bench.models import load_bench_model, vocab_size
from sparsecache.bench.results import Result
from sparsecache.bench.timing import check_workers, time_requests
from sparsecache.bench.workload import Workload, sample_requests
from sparsecache.cluster.connection import Cluster
from sparsecache.cluster.worker import Worker, WorkerConfig, WorkerInfo
from sparsecache.cluster.workers import PoolSize, Workers
from sparsecache.engine.base import Completion, Engine, EngineStats, Request
from sparsecache.engine.devices import find_device
from sparsecache.engine.loading import DTYPES


@dataclass(frozen=True)
class WorkerGroup:
    """How many workers there are, over which model, and how many sequences each decodes together."""

    workers: int
    model: str
    dtype: str
    device: str
    slots: int


def replay_by_workers(group: WorkerGroup, file: Path, rows: int) -> Iterator[Result]:
    """Yield the time per prompt of a replay by all workers and by 2, 4, ... of them, compared with one worker.

    Workers are loaded once; after each replay some are ended. On a CPU each has its share of the threads, the single
    one too.
    """
    requests = sample_requests(file, rows, vocab_size(group.model))
    powers = {2**power for power in range(group.workers.bit_length())}
    measured: dict[int, tuple[float, EngineStats]] = {}
    with _started(group, requests) as engine:
        for workers in sorted({group.workers, *powers}, reverse=True):
            engine.scale_down(workers)
            engine.wait()  # until all are loaded and warm
            print(f"{len(requests)} prompts by {workers} workers:", file=sys.stderr)
            measured[workers] = time_requests(engine, requests)
            check_workers(engine.session()["workers"], workers)
            print(f"{measured[workers][0]:.1f} s.", file=sys.stderr)
    single_s, _ = measured.pop(1)
    for workers, (seconds, stats) in sorted(measured.items()):
        yield Result(
            f"replay of {len(requests)} prompts by {workers} workers",
            seconds / len(requests),
            baselines={"one worker": single_s / len(requests)},
            notes={
                "prompts_per_s": len(requests) / seconds,
                "prompt_tokens": stats.prefill_tokens,
                "slots": group.slots,
            },
        )


@dataclass(frozen=True)
class _EngineLoader:
    """Loads the bench's model in a worker."""

    group: WorkerGroup
    vocab_size: int

    def __call__(self) -> tuple[Engine, list[torch.device]]:
        device = find_device(self.group.device)
        model = load_bench_model(self.group.model, [device], DTYPES[self.group.dtype])
        return model.engine(slots=self.group.slots), [device]


class _BenchWorker(Worker):
    def load(self, config: WorkerConfig) -> WorkerInfo:
        assert isinstance(config.load_engine, _EngineLoader)
        self._vocab_size, self._reserved = config.load_engine.vocab_size, 0
        self._first: Completion | None = None
        return super().load(config)

    def reserve(self, max_tokens: int, max_new_tokens: int | None = None) -> None:
        """As Engine.reserve; then decode a prompt of that length, so that the worker is warm."""
        if max_tokens > self._reserved:
            super().reserve(max_tokens, max_new_tokens)
            self._reserved = max_tokens
            (self._first,) = self._engine.generate(Workload(max(1, max_tokens - 2), 2).requests(self._vocab_size))

    def sync(self) -> None:
        """As Worker.sync; raises RuntimeError if that prompt failed, since the worker is not warm."""
        if self._first is not None and self._first.error is not None:
            raise RuntimeError(f"a worker's first prompt failed: {self._first.error}")


@contextmanager
def _started(group: WorkerGroup, requests: list[Request]) -> Iterator[Workers]:
    """Start the workers on a cluster of this machine, with memory for the longest request.

    Raises UsageError if the machine has too few GPUs or CPUs.
    """
    size = PoolSize(group.workers, "GPU" if group.device == "cuda" else "CPU")
    with Cluster(None) as cluster:
        cluster.connect()
        size.check_fits(cluster)
        loader = _EngineLoader(group, vocab_size(group.model))
        config = WorkerConfig(loader, cluster.threads(group.workers), os.getcwd())
        with Workers(cluster, config, size, group.slots, _BenchWorker) as workers:
            max_tokens = max(len(request.token_ids) + request.max_new_tokens for request in requests)
            workers.reserve(max_tokens, max(request.max_new_tokens for request in requests))
            yield workers
