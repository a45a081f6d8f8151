"""Workers of a Ray cluster behind the interface of one engine: whoever asks for completions sees no difference."""

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
from sparsecache.cluster.handout import STRIKES, Handout, Load
from sparsecache.cluster.worker import Orders, Place, Reply, Worker
from sparsecache.configs import project_dir
from sparsecache.engine.base import Clock, Completion, Request, Tick, no_tick
from sparsecache.errors import UsageError, one_line
from sparsecache.settings import Settings
from sparsecache.versions import installed_versions

_CALLS = 2  # under way for each worker, so that none waits for the driver
_MOST_DEATHS = STRIKES**2  # for each worker, without a row that was finished meanwhile
_PATIENCE_S = 60.0  # before it is said that workers are missing
_POLL_S = 0.2


@dataclass
class _Seat:
    """A worker, from its start to its end. calls: what it has been asked, oldest first; the first of all is to load."""

    number: int
    actor: Any
    calls: deque[Any]
    failed_starts: int = 0
    place: Place | None = None
    load: Load = field(default_factory=Load)
    clock: Clock = field(default_factory=Clock)
    rows: int = 0
    seconds: float = 0.0
    died: bool = False

    def __str__(self) -> str:
        where = f" on {self.place.node} (process {self.place.pid})" if self.place else ""
        return f"worker {self.number + 1}{where}"

    def record(self) -> dict[str, Any]:
        """Its line in run.json."""
        place = asdict(self.place) if self.place else {}
        totals = {"rows": self.rows, "seconds": round(self.seconds, 3), "died": self.died}
        return {"worker": self.number + 1, **place, **totals}


class Workers:
    """The engine whose requests are completed by many workers, each with `slots` in flight at most.

    A worker that dies is replaced, and its rows are done again; a row on which three died comes back as an error. A
    worker that dies three times in a row before it has loaded the model is not replaced any more.
    """

    def __init__(self, cluster: Cluster, orders: Orders, slots: int, worker: type[Worker]):
        """Starts the workers; the cluster must have room for them."""
        self._cluster, self._slots, self._remote = cluster, slots, ray.remote(worker)
        self._kind, self._each = _need(orders.settings)
        self._orders = ray.put(orders)
        self._room = 0
        self._gone: list[_Seat] = []
        self._deaths = 0  # since a row ended
        self._began = self._latest = 0.0  # when the first worker was ready, and when the latest row ended
        self._seats = [self._start(number) for number in range(orders.settings.workers)]

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for seat in self._seats:
            ray.kill(seat.actor)

    @property
    def clock(self) -> Clock:
        """The sum over all workers, so that tokens per second are those of one; the peak memory is the highest."""
        clocks = [seat.clock for seat in self._gone + self._seats]
        peaks = [clock.peak_gpu_bytes for clock in clocks if clock.peak_gpu_bytes is not None]
        totals = {
            each.name: sum(getattr(clock, each.name) for clock in clocks)
            for each in fields(Clock)
            if each.name != "peak_gpu_bytes"
        }
        return Clock(**totals, peak_gpu_bytes=max(peaks, default=None))

    def session(self) -> dict[str, Any]:
        """The clock, a line for every worker that came to work, and the seconds from the first one to the last row."""
        seats = sorted((seat for seat in self._gone + self._seats if seat.place), key=lambda seat: seat.number)
        gpus = sorted({seat.place.gpu for seat in seats if seat.place and seat.place.gpu})
        return {
            "clock": asdict(self.clock),
            "gpu": ", ".join(gpus) or None,
            "seconds": round(max(0.0, self._latest - self._began), 3),
            "workers": [seat.record() for seat in seats],
        }

    def wait(self) -> None:
        """Until every worker has loaded the model and done all that it was told by now."""
        resting = [seat.actor.rest.remote() for seat in self._seats]
        while missing := ray.wait(resting, num_returns=len(resting), timeout=_PATIENCE_S)[1]:
            self._say_who_is_missing(len(missing))
        ray.get(resting)

    def reserve(self, max_tokens: int) -> None:
        """Makes room in every worker."""
        self._room = max_tokens
        for seat in self._seats:
            seat.actor.reserve.remote(max_tokens)

    def reset_clock(self) -> None:
        """Starts all totals anew."""
        self._gone.clear()
        for seat in self._seats:
            seat.clock, seat.seconds, seat.rows = Clock(), 0.0, 0
            seat.actor.reset_clock.remote()

    def dismiss_all_but(self, number: int) -> None:
        """Ends workers, until so many are left; between requests only, for what they have in hand is lost."""
        for seat in self._seats[number:]:
            ray.kill(seat.actor)
        self._gone += self._seats[number:]
        del self._seats[number:]

    def generate(self, requests: Iterable[Request], tick: Tick = no_tick) -> Iterator[Completion]:
        """Yields a completion for every request, in the order in which they end; requests are drawn in theirs."""
        handout = Handout(requests, len(self._seats), self._slots)
        complete = time.monotonic()
        while True:
            for seat in self._seats:
                self._employ(seat, handout)
            if handout.empty and not any(seat.load.requests for seat in self._seats):
                return
            answered = self._answered(0 if handout.prepare() else _POLL_S)
            if all(seat.place for seat in self._seats):
                complete = time.monotonic()
            elif time.monotonic() - complete > _PATIENCE_S:
                self._say_who_is_missing(sum(seat.place is None for seat in self._seats))
                complete = time.monotonic()
            for seat in answered:
                for completion in self._hear(seat, handout):
                    tick(len(completion.token_ids))
                    yield completion

    def _employ(self, seat: _Seat, handout: Handout) -> None:
        """Keeps calls under way: each brings what is to be done, and returns one completion."""
        while seat.place and len(seat.calls) < _CALLS:
            handed = handout.take(seat.load)
            if not handed and len(seat.calls) >= len(seat.load.requests):
                return
            seat.calls.append(seat.actor.work.remote(handed))

    def _answered(self, timeout: float) -> list[_Seat]:
        calls = {seat.calls[0]: seat for seat in self._seats if seat.calls}
        if not calls:
            return []
        ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        if not ready and timeout:
            ready, _ = ray.wait(list(calls), num_returns=1, timeout=timeout)
        return [calls[call] for call in ready]

    def _hear(self, seat: _Seat, handout: Handout) -> Iterator[Completion]:
        """Takes a worker's oldest answer, or its death."""
        try:
            answer = ray.get(seat.calls[0])
        except RayError as error:
            if isinstance(error, RayTaskError) and isinstance(error.cause, UsageError):
                raise error.cause from None
            if isinstance(error, RayTaskError) and seat.place:
                raise  # a mistake in the code, not in a machine
            yield from self._replace(seat, handout, error)
            return
        seat.calls.popleft()
        if isinstance(answer, Place):
            seat.place, seat.failed_starts = answer, 0
            self._began = self._began or time.monotonic()
        else:
            yield from self._note(seat, answer)

    def _note(self, seat: _Seat, reply: Reply) -> Iterator[Completion]:
        seat.clock, seat.seconds = reply.clock, reply.seconds
        if reply.said:
            tqdm.write(f"On {seat}: {reply.said.rstrip()}", file=sys.stderr)
        if reply.completion is not None and reply.ticket is not None:
            self._deaths = 0
            self._latest = time.monotonic()
            seat.rows += 1
            yield replace(reply.completion, request=seat.load.requests.pop(reply.ticket))

    def _replace(self, seat: _Seat, handout: Handout, error: RayError) -> Iterator[Completion]:
        """Starts another worker in the place of a dead one, or gives the place up."""
        seat.died, reason = True, _reason(error)
        ray.kill(seat.actor)
        self._gone.append(seat)
        self._deaths += 1
        failed_starts = 0 if seat.place else seat.failed_starts + 1
        place = self._seats.index(seat)
        if failed_starts < STRIKES:
            self._seats[place] = self._start(seat.number, failed_starts)
            told = f"it is replaced, and the rows it had in hand ({len(seat.load.requests)}) are done again"
        else:
            del self._seats[place]
            told = f"as two before it, before it had loaded the model; {len(self._seats)} others go on"
        tqdm.write(f"Warning: {seat} died, {told}. Reason: {reason}", file=sys.stderr)
        for request in handout.lost(seat.load):
            yield Completion(request, error=f"WorkerDied: {STRIKES} workers died on this row, the last was {seat}")
        if not self._seats or self._deaths >= _MOST_DEATHS * len(self._seats):
            raise UsageError(
                f"{self._deaths} workers died and no row was finished meanwhile. Finished rows are kept: the same "
                f"command goes on from there once the reason is gone. The last one's: {reason}"
            )

    def _start(self, number: int, failed_starts: int = 0) -> _Seat:
        actor = self._remote.options(**self._needs()).remote()
        seat = _Seat(number, actor, deque([actor.load.remote(self._orders)]), failed_starts)
        if self._room:
            actor.reserve.remote(self._room)
        return seat

    def _needs(self) -> dict[str, Any]:
        return {
            "num_cpus": 1,
            "num_gpus": self._each if self._kind == "GPU" else 0,
            "scheduling_strategy": "SPREAD",
            "runtime_env": {"env_vars": {"PYTHONPATH": _import_path()}},
        }

    def _say_who_is_missing(self, missing: int) -> None:
        self._cluster.check_room(1, self._kind, self._each)
        tqdm.write(
            f"{missing} of {len(self._seats)} workers are not ready after {_PATIENCE_S:.0f} s: they load the model, or "
            f"wait for {self._kind}s, of which {self._cluster.free(self._kind)} of {self._cluster.total(self._kind)} "
            f"are free in {self._cluster}.",
            file=sys.stderr,
        )


def check_room(cluster: Cluster, settings: Settings) -> None:
    """Connects; raises UsageError if there is no cluster or, with the numbers, if it has too few GPUs or CPUs."""
    cluster.connect()
    cluster.check_room(settings.workers, *_need(settings))


def hire(cluster: Cluster, settings: Settings, identity: dict[str, Any], most_rows: int) -> Workers:
    """The workers that the settings ask for. Raises UsageError as `check_room`."""
    check_room(cluster, settings)
    kind, each = _need(settings)
    stated = os.environ.get("OMP_NUM_THREADS", "")  # for each process: several runs may share the cluster
    sharing = settings.workers if kind == "CPU" else cluster.total("GPU") // each
    threads = int(stated) if stated.isdecimal() and int(stated) else cluster.threads(sharing)
    orders = Orders(settings, identity, installed_versions(), most_rows, threads, os.getcwd())
    return Workers(cluster, orders, min(settings.slots(settings.device), most_rows), Worker)


def _reason(error: RayError) -> str:
    """What Ray says of a death, without whose it was and what it often is."""
    text = one_line(error)
    return text.partition("The actor is dead because ")[2].partition(" Some common causes")[0] or text


def _import_path() -> str:
    """PYTHONPATH of a worker: this code, then the driver's own PYTHONPATH, without entries for the current folder."""
    own = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.pathsep.join([str(project_dir()), *own])


def _need(settings: Settings) -> tuple[str, int]:
    """What a worker must have to itself, and how many of it."""
    return ("GPU", settings.gpus_per_worker) if settings.device == "cuda" else ("CPU", 1)
