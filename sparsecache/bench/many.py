"""The replay over several GPUs: workers as a run has them, over the bench's own models."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsecache.bench.lines import Line
from sparsecache.bench.models import load_subject, vocabulary_of
from sparsecache.bench.modes import Job, requests_of, timed
from sparsecache.cluster.connection import Cluster
from sparsecache.cluster.worker import Worker, WorkerConfig, WorkerInfo
from sparsecache.cluster.workers import PoolSize, Workers
from sparsecache.engine.base import Clock, Completion, Engine, Request
from sparsecache.engine.devices import find_device
from sparsecache.engine.loading import DTYPES


@dataclass(frozen=True)
class Crew:
    """Workers to be: how many, over which model, with how many sequences at once each."""

    workers: int
    model: str
    dtype: str
    device: str
    slots: int


def replay_by_many(crew: Crew, workload: Path, rows: int) -> Iterator[Line]:
    """Milliseconds a prompt of a replay by all workers and by 2, 4, .. of them, on GPUs of their own, beside one alone.

    They are loaded once: first all work, then some of them are ended. On a CPU each has its share of the threads,
    the one alone, too.
    """
    requests = requests_of(vocabulary_of(crew.model), workload, rows)
    taken: dict[int, tuple[float, Clock]] = {}
    with _working(crew, requests) as engine:
        for workers in sorted({crew.workers, *(2**power for power in range(crew.workers.bit_length()))}, reverse=True):
            engine.scale_down(workers)
            engine.wait()  # all are loaded and warm
            print(f"{len(requests)} prompts, by {workers}:", file=sys.stderr)
            taken[workers] = timed(engine, requests)
            worked = engine.session()["workers"]
            if len(worked) != workers or any(worker["died"] for worker in worked):
                raise RuntimeError(f"of {workers} workers one died and was replaced, so that the time says nothing.")
            print(f"{taken[workers][0]:.1f} s.", file=sys.stderr)
    alone, _ = taken.pop(1)
    for workers, (seconds, clock) in sorted(taken.items()):
        notes = {"prompts_per_s": len(requests) / seconds, "prompt_tokens": clock.prefill_tokens, "slots": crew.slots}
        what = f"replay of {len(requests)} prompts by {workers} workers"
        yield Line(what, seconds / len(requests), None, {"one worker": alone / len(requests)}, notes)


@dataclass(frozen=True)
class _EngineLoader:
    """Loads the bench's model in a worker."""

    crew: Crew
    vocabulary: int

    def __call__(self) -> tuple[Engine, list[torch.device]]:
        device = find_device(self.crew.device)
        subject = load_subject(self.crew.model, [device], DTYPES[self.crew.dtype])
        return subject.engine(slots=self.crew.slots), [device]


class _BenchWorker(Worker):
    def load(self, config: WorkerConfig) -> WorkerInfo:
        assert isinstance(config.load_engine, _EngineLoader)
        self._vocabulary, self._reserved = config.load_engine.vocabulary, 0
        self._first: Completion | None = None
        return super().load(config)

    def reserve(self, max_tokens: int) -> None:
        """As Engine.reserve; a first prompt of that length is decoded, so that every worker is warm."""
        if max_tokens > self._reserved:
            super().reserve(max_tokens)
            self._reserved = max_tokens
            (self._first,) = self._engine.generate(Job(max(1, max_tokens - 2), 2).requests(self._vocabulary))

    def sync(self) -> None:
        """As Worker.sync; raises RuntimeError where that prompt failed, since the worker is not warm."""
        if self._first is not None and self._first.error is not None:
            raise RuntimeError(f"a worker's first prompt failed: {self._first.error}")


@contextmanager
def _working(crew: Crew, requests: list[Request]) -> Iterator[Workers]:
    """The crew on a cluster of this machine's, which make room for the longest of the requests.

    Raises UsageError where the machine has no room for so many.
    """
    size = PoolSize(crew.workers, "GPU" if crew.device == "cuda" else "CPU")
    with Cluster(None) as cluster:
        cluster.connect()
        size.check_fits(cluster)
        loader = _EngineLoader(crew, vocabulary_of(crew.model))
        config = WorkerConfig(loader, cluster.threads(crew.workers), os.getcwd())
        with Workers(cluster, config, size, crew.slots, _BenchWorker) as workers:
            workers.reserve(max(len(request.token_ids) + request.max_new_tokens for request in requests))
            yield workers
