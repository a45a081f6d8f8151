"""A worker: loads an engine once, then takes requests and returns completions, call by call. Does not import Ray."""

import contextlib
import io
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from sparsecache.cluster.work_queue import Tickets
from sparsecache.engine.base import Completion, Engine, EngineStats, Request
from sparsecache.engine.devices import gpu_name

LoadEngine = Callable[[], tuple[Engine, list[torch.device]]]
"""Loads an engine; returns it with its devices. It is pickled, and called in the worker's process."""


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker needs to start. threads: for work on the CPU. folder: the driver's current folder."""

    load_engine: LoadEngine
    threads: int
    folder: str


@dataclass(frozen=True)
class WorkerInfo:
    """Where a worker runs: machine, process id, GPU name, and CUDA_VISIBLE_DEVICES (gpus)."""

    node: str
    pid: int
    gpu: str | None
    gpus: str | None


@dataclass(frozen=True)
class Reply:
    """A worker's next completion, without its prompt, and the worker's totals so far.

    ticket, completion: None if the worker held no request. seconds: spent in calls. stderr: what was written to it.
    """

    ticket: int | None
    completion: Completion | None
    stats: EngineStats
    seconds: float
    stderr: str


class Worker:
    """Completes requests in its own process."""

    def __init__(self) -> None:
        self._pending: deque[Request] = deque()
        self._completions: Iterator[Completion] = iter(())
        self._seconds = 0.0

    def load(self, config: WorkerConfig) -> WorkerInfo:
        """Loads the engine, in the driver's current folder. Raises what `config.load_engine` raises."""
        torch.set_num_threads(config.threads)
        with contextlib.suppress(OSError):
            os.chdir(config.folder)
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            self._engine, devices = config.load_engine()
        self._device = devices[0]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or None
        return WorkerInfo(platform.node(), os.getpid(), gpu_name(devices), visible)

    def reserve(self, max_tokens: int, max_new_tokens: int | None = None) -> None:
        """Calls Engine.reserve."""
        self._engine.reserve(max_tokens, max_new_tokens)

    def reset_stats(self) -> None:
        """Calls Engine.reset_stats."""
        self._engine.reset_stats()

    def sync(self) -> None:
        """Does nothing. When it returns, all earlier calls have ended."""

    def process(self, tickets: Tickets) -> Reply:
        """Adds requests, and returns the next completion of all requests that the worker holds."""
        start = time.perf_counter()
        self._pending.extend(replace(request, key=ticket) for ticket, request in tickets)
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            completion = next(self._completions, None) or self._restart_generation()
        if completion is not None and completion.error is not None:
            _exit_if_device_is_broken(self._device)
        self._seconds += time.perf_counter() - start
        if completion is None:
            return Reply(None, None, self._engine.stats, self._seconds, stderr.getvalue())
        ticket = completion.key
        completion = replace(completion, request=replace(completion.request, token_ids=[]))
        return Reply(ticket, completion, self._engine.stats, self._seconds, stderr.getvalue())

    def _restart_generation(self) -> Completion | None:
        """Starts the engine again for requests that came after it had seen the end of its input."""
        self._completions = self._engine.generate(self._requests())
        return next(self._completions, None)

    def _requests(self) -> Iterator[Request]:
        while self._pending:
            yield self._pending.popleft()


def _exit_if_device_is_broken(device: torch.device) -> None:
    """Ends the process if its GPU no longer computes, since every further row would fail; the driver replaces it."""
    try:
        torch.ones(1, device=device).sum().item()
    except Exception:
        os._exit(1)
