"""One worker: an engine with its weights loaded once, fed and emptied call by call. Knows nothing of Ray."""

import contextlib
import io
import os
import platform
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsecache.cluster.handout import Handed
from sparsecache.engine.base import Clock, Completion, Engine, Request
from sparsecache.errors import UsageError
from sparsecache.plan import Plan
from sparsecache.provenance import gpu_name
from sparsecache.settings import Settings
from sparsecache.versions import installed_versions


@dataclass(frozen=True)
class Orders:
    """What a worker is to load, and what it must find: the run's identity and the versions it is made with.

    folder: the driver's, which relative paths are relative to; threads: for work on the CPU.
    """

    settings: Settings
    identity: dict[str, Any]
    versions: dict[str, str]
    most_rows: int
    threads: int
    folder: str


@dataclass(frozen=True)
class Place:
    """Where a worker runs. gpus: the numbers of its GPUs on that machine."""

    node: str
    pid: int
    gpu: str | None
    gpus: str | None


@dataclass(frozen=True)
class Reply:
    """What ended, and the worker's totals by then.

    ticket, completion: of the row that ended (without its prompt), None when nothing was in hand. seconds: spent in
    calls. said: what was written to stderr meanwhile.
    """

    ticket: int | None
    completion: Completion | None
    clock: Clock
    seconds: float
    said: str


class Worker:
    """Completes requests as they come in."""

    def __init__(self) -> None:
        self._waiting: deque[Request] = deque()
        self._completions: Iterator[Completion] = iter(())
        self._seconds = 0.0

    def load(self, orders: Orders) -> Place:
        """Loads the checkpoint. Raises UsageError where this machine's code, files or devices are not the driver's."""
        torch.set_num_threads(orders.threads)
        with contextlib.suppress(OSError):
            os.chdir(orders.folder)
        with contextlib.redirect_stderr(io.StringIO()):  # bars, on the way to a log
            self._engine, devices = self.make_engine(orders)
        self._device = devices[0]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or None
        return Place(platform.node(), os.getpid(), gpu_name(devices), visible)

    def make_engine(self, orders: Orders) -> tuple[Engine, list[torch.device]]:
        """What `load` loads, and the devices that it is on."""
        node = platform.node()
        _compare(orders.versions, installed_versions(), f"The versions on {node}", "Install the same on every machine.")
        plan = Plan(replace(orders.settings, workers=1, ray_address=None))
        plan.fetch_weights()
        _compare(
            orders.identity,
            plan.identity(),
            f"What {node} finds",
            "Give every machine the same clone and the same checkpoint, at the same path.",
        )
        return plan.engine(orders.most_rows), plan.devices

    def reserve(self, max_tokens: int) -> None:
        """As Engine.reserve."""
        self._engine.reserve(max_tokens)

    def reset_clock(self) -> None:
        """As Engine.reset_clock."""
        self._engine.reset_clock()

    def rest(self) -> None:
        """Does nothing, once all before it is done."""

    def work(self, handed: Handed) -> Reply:
        """Takes requests in, and returns the next completion of all that are in hand."""
        began = time.perf_counter()
        self._waiting.extend(replace(request, key=ticket) for ticket, request in handed)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            completion = next(self._completions, None) or self._go_on()
        if completion is not None and completion.error is not None:
            _end_if_broken(self._device)
        self._seconds += time.perf_counter() - began
        if completion is None:
            return Reply(None, None, self._engine.clock, self._seconds, said.getvalue())
        ticket = completion.key
        completion = replace(completion, request=replace(completion.request, token_ids=[]))
        return Reply(ticket, completion, self._engine.clock, self._seconds, said.getvalue())

    def _go_on(self) -> Completion | None:
        """With what came in after the engine had seen the end of its requests."""
        self._completions = self._engine.generate(self._requests())
        return next(self._completions, None)

    def _requests(self) -> Iterator[Request]:
        while self._waiting:
            yield self._waiting.popleft()


def _end_if_broken(device: torch.device) -> None:
    """Ends the process, to be replaced, if its GPU answers no more: every further row would fail."""
    try:
        torch.ones(1, device=device).sum().item()
    except Exception:
        os._exit(1)


def _compare(wanted: dict[str, Any], found: dict[str, Any], what: str, way_out: str) -> None:
    differing = [f"{key} is {found.get(key)}, not {value}" for key, value in wanted.items() if found.get(key) != value]
    if differing:
        raise UsageError(f"{what} differs from what the run began with: {'; '.join(differing)}. {way_out}")
