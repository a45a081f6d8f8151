"""An engine that spreads requests over many workers on a Ray cluster."""

import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from tqdm import tqdm

from sparsecache.cluster.connection import Cluster
from sparsecache.cluster.work_queue import MAX_ATTEMPTS, Assigned, WorkQueue
from sparsecache.cluster.worker import Reply, Worker, WorkerConfig, WorkerInfo
from sparsecache.configs import project_dir
from sparsecache.engine.base import Completion, EngineStats, OnTokens, Request, ignore_tokens
from sparsecache.errors import UsageError, one_line

_CALLS = 2  # in flight per worker, so that none waits for the driver
_MAX_DEATHS = MAX_ATTEMPTS**2  # per worker, without a row finished in between
_REPORT_AFTER_S = 60.0  # how often missing workers are reported
_POLL_S = 0.2


@dataclass(frozen=True)
class PoolSize:
    """How many workers a run has, and what each reserves: `per_worker` GPUs or CPUs (kind)."""

    workers: int
    kind: str
    per_worker: int = 1

    def check_fits(self, cluster: Cluster) -> None:
        """Raises UsageError, with the numbers, if the connected cluster has too few GPUs or CPUs."""
        cluster.check_capacity(self.workers, self.kind, self.per_worker)


@dataclass
class WorkerHandle:
    """The driver's side of one worker, from its start to its end.

    calls: the calls in flight, oldest first; the first of all is `load`. info: None until the worker has loaded.
    """

    number: int
    actor: Any
    calls: deque[Any]
    failed_starts: int = 0
    info: WorkerInfo | None = None
    assigned: Assigned = field(default_factory=Assigned)
    stats: EngineStats = field(default_factory=EngineStats)
    rows: int = 0
    seconds: float = 0.0
    died: bool = False

    def __str__(self) -> str:
        where = f" on {self.info.node} (process {self.info.pid})" if self.info else ""
        return f"worker {self.number + 1}{where}"

    def record(self) -> dict[str, Any]:
        """Returns its entry in run.json."""
        info = asdict(self.info) if self.info else {}
        totals = {"rows": self.rows, "seconds": round(self.seconds, 3), "died": self.died}
        return {"worker": self.number + 1, **info, **totals}


class Workers:
    """An engine whose requests are completed by many workers, each with at most `slots` in flight.

    A worker that dies is replaced, and its rows are decoded again; a row on which three died becomes an error. A
    worker that dies three times in a row before it has loaded the model is not replaced.
    """

    def __init__(
        self, cluster: Cluster, config: WorkerConfig, size: PoolSize, slots: int, worker: type[Worker] = Worker
    ):
        """Starts the workers; the cluster must have room for them."""
        self._cluster, self._size, self._slots, self._remote = cluster, size, slots, ray.remote(worker)
        self._config = ray.put(config)
        self._reserved: tuple[int, int | None] | None = None  # arguments of `reserve`
        self._ended: list[WorkerHandle] = []
        self._deaths = 0  # deaths since a row was finished
        self._first_ready = self._last_row = 0.0
        self._handles = [self._start(number) for number in range(size.workers)]

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            ray.kill(handle.actor)

    @property
    def stats(self) -> EngineStats:
        """Returns the sum over all workers, and the highest peak of memory.

        Tokens per second of this sum are those of one worker.
        """
        all_stats = [handle.stats for handle in self._ended + self._handles]
        peaks = [each.peak_gpu_bytes for each in all_stats if each.peak_gpu_bytes is not None]
        names = [each.name for each in fields(EngineStats) if each.name != "peak_gpu_bytes"]
        totals = {name: sum(getattr(each, name) for each in all_stats) for name in names}
        return EngineStats(**totals, peak_gpu_bytes=max(peaks, default=None))

    def session(self) -> dict[str, Any]:
        """Returns the stats as "clock", the seconds from first ready worker to last row, and an entry per worker."""
        handles = sorted((one for one in self._ended + self._handles if one.info), key=lambda handle: handle.number)
        gpus = sorted({handle.info.gpu for handle in handles if handle.info and handle.info.gpu})
        return {
            "clock": asdict(self.stats),
            "gpu": ", ".join(gpus) or None,
            "seconds": round(max(0.0, self._last_row - self._first_ready), 3),
            "workers": [handle.record() for handle in handles],
        }

    def wait(self) -> None:
        """Waits until every worker has loaded the model and has done all earlier calls."""
        calls = [handle.actor.sync.remote() for handle in self._handles]
        while missing := ray.wait(calls, num_returns=len(calls), timeout=_REPORT_AFTER_S)[1]:
            self._report_missing(len(missing))
        ray.get(calls)

    def check_loaded(self) -> None:
        """Waits until every worker has loaded its engine. Raises the UsageError of one that could not."""
        for handle in self._handles:
            while not ray.wait([handle.calls[0]], timeout=_REPORT_AFTER_S)[0]:
                self._report_missing(1)
            try:
                ray.get(handle.calls[0])
            except RayError as error:
                if isinstance(error, RayTaskError) and isinstance(error.cause, UsageError):
                    raise error.cause from None
                # `generate` replaces a worker that died.

    def reserve(self, max_tokens: int, max_new_tokens: int | None = None) -> None:
        """Calls Engine.reserve in every worker."""
        self._reserved = max_tokens, max_new_tokens
        for handle in self._handles:
            handle.actor.reserve.remote(max_tokens, max_new_tokens)

    def reset_stats(self) -> None:
        """Sets all totals to zero."""
        self._ended.clear()
        for handle in self._handles:
            handle.stats, handle.seconds, handle.rows = EngineStats(), 0.0, 0
            handle.actor.reset_stats.remote()

    def scale_down(self, workers: int) -> None:
        """Ends workers until `workers` are left. Only between calls of `generate`: the requests they hold are lost."""
        for handle in self._handles[workers:]:
            ray.kill(handle.actor)
        self._ended += self._handles[workers:]
        del self._handles[workers:]

    def generate(self, requests: Iterable[Request], on_tokens: OnTokens = ignore_tokens) -> Iterator[Completion]:
        """Yields a completion per request, in the order in which they end; requests are drawn in their order."""
        queue = WorkQueue(requests, len(self._handles), self._slots)
        all_ready = time.monotonic()
        while True:
            for handle in self._handles:
                self._submit(handle, queue)
            if queue.empty and not any(handle.assigned.requests for handle in self._handles):
                return
            ready = self._poll(0 if queue.prefetch() else _POLL_S)
            if all(handle.info for handle in self._handles):
                all_ready = time.monotonic()
            elif time.monotonic() - all_ready > _REPORT_AFTER_S:
                self._report_missing(sum(handle.info is None for handle in self._handles))
                all_ready = time.monotonic()
            for handle in ready:
                for completion in self._receive(handle, queue):
                    on_tokens(len(completion.token_ids))
                    yield completion

    def _submit(self, handle: WorkerHandle, queue: WorkQueue) -> None:
        """Keeps _CALLS calls in flight: each brings requests, and returns one completion."""
        while handle.info and len(handle.calls) < _CALLS:
            tickets = queue.take(handle.assigned)
            if not tickets and len(handle.calls) >= len(handle.assigned.requests):
                return
            handle.calls.append(handle.actor.process.remote(tickets))

    def _poll(self, timeout: float) -> list[WorkerHandle]:
        """Returns the workers whose oldest call has ended; waits up to `timeout` seconds for one."""
        calls = {handle.calls[0]: handle for handle in self._handles if handle.calls}
        if not calls:
            return []
        ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        if not ready and timeout:
            ready, _ = ray.wait(list(calls), num_returns=1, timeout=timeout)
        return [calls[call] for call in ready]

    def _receive(self, handle: WorkerHandle, queue: WorkQueue) -> Iterator[Completion]:
        """Handles the result of a worker's oldest call, or its death."""
        try:
            answer = ray.get(handle.calls[0])
        except RayError as error:
            if isinstance(error, RayTaskError) and isinstance(error.cause, UsageError):
                raise error.cause from None
            if isinstance(error, RayTaskError) and handle.info:
                raise  # a bug in the code: a replacement would fail the same way
            yield from self._replace(handle, queue, error)
            return
        handle.calls.popleft()
        if isinstance(answer, WorkerInfo):
            handle.info, handle.failed_starts = answer, 0
            self._first_ready = self._first_ready or time.monotonic()
        else:
            yield from self._handle_reply(handle, answer)

    def _handle_reply(self, handle: WorkerHandle, reply: Reply) -> Iterator[Completion]:
        handle.stats, handle.seconds = reply.stats, reply.seconds
        if reply.stderr:
            tqdm.write(f"On {handle}: {reply.stderr.rstrip()}", file=sys.stderr)
        if reply.completion is not None and reply.ticket is not None:
            self._deaths = 0
            self._last_row = time.monotonic()
            handle.rows += 1
            yield replace(reply.completion, request=handle.assigned.requests.pop(reply.ticket))

    def _replace(self, handle: WorkerHandle, queue: WorkQueue, error: RayError) -> Iterator[Completion]:
        """Replaces a dead worker, unless it failed to load MAX_ATTEMPTS times in a row."""
        handle.died, reason = True, _reason(error)
        ray.kill(handle.actor)
        self._ended.append(handle)
        self._deaths += 1
        failed_starts = 0 if handle.info else handle.failed_starts + 1
        index = self._handles.index(handle)
        if failed_starts < MAX_ATTEMPTS:
            self._handles[index] = self._start(handle.number, failed_starts)
            action = f"it is replaced, and its {len(handle.assigned.requests)} unfinished rows are decoded again"
        else:
            del self._handles[index]
            action = f"for the third time before it had loaded the model; {len(self._handles)} other workers continue"
        tqdm.write(f"Warning: {handle} died, {action}. Reason: {reason}", file=sys.stderr)
        for request in queue.requeue(handle.assigned):
            yield Completion(
                request, error=f"WorkerDied: {MAX_ATTEMPTS} workers died on this row, the last was {handle}"
            )
        if not self._handles or self._deaths >= _MAX_DEATHS * len(self._handles):
            raise UsageError(
                f"{self._deaths} workers died in a row without finishing a row. The last reason: {reason}. Finished "
                f"rows are kept. Remove the cause, then rerun the same command to resume."
            )

    def _start(self, number: int, failed_starts: int = 0) -> WorkerHandle:
        actor = self._remote.options(**self._ray_options()).remote()
        handle = WorkerHandle(number, actor, deque([actor.load.remote(self._config)]), failed_starts)
        if self._reserved is not None:
            actor.reserve.remote(*self._reserved)
        return handle

    def _ray_options(self) -> dict[str, Any]:
        return {
            "num_cpus": 1,
            "num_gpus": self._size.per_worker if self._size.kind == "GPU" else 0,
            "scheduling_strategy": "SPREAD",
            "runtime_env": {"env_vars": {"PYTHONPATH": _import_path()}},
        }

    def _report_missing(self, missing: int) -> None:
        kind = self._size.kind
        replace(self._size, workers=1).check_fits(self._cluster)
        tqdm.write(
            f"{missing} of {len(self._handles)} workers are not ready after {_REPORT_AFTER_S:.0f} s: they load the "
            f"model, or wait for {kind}s. {self._cluster.free(kind)} of {self._cluster.total(kind)} {kind}s are free "
            f"in {self._cluster}.",
            file=sys.stderr,
        )


def _reason(error: RayError) -> str:
    """Ray's reason for a death, without the actor's name and the list of common causes."""
    text = one_line(error)
    return (text.partition("The actor is dead because ")[2].partition(" Some common causes")[0] or text).rstrip(".")


def _import_path() -> str:
    """PYTHONPATH of a worker: this code, then the driver's own PYTHONPATH, without entries for the current folder."""
    own = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.pathsep.join([str(project_dir()), *own])
