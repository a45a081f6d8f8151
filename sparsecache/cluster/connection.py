"""The Ray cluster that a run uses: found or started, measured before it is used, and left or stopped at the end."""

import contextlib
import os
import signal
import socket
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import psutil
import ray
import torch

from sparsecache.errors import UsageError, one_line

_OBJECT_STORE = 128 * 2**20  # bytes; what goes through it are prompts
_PROBE_S = 5.0
_TERMINATED = 128 + signal.SIGTERM  # the exit code


class Cluster:
    """A cluster at an address, or (None) one of this machine alone, started when it is needed."""

    def __init__(self, address: str | None):
        self.address = address
        self._before: list[psutil.Process] | None = None  # this process's children, before Ray's were started
        self._on_term: Any = None  # what SIGTERM did before, to be done again
        self._terminated = False

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._on_term is not None:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends already
            children = [] if self._before is None else psutil.Process().children(recursive=True)
            ray.shutdown()
            for child in children:
                if child not in (self._before or ()):  # helpers that would wait a minute for a head that is gone
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            if self._on_term is not None:
                signal.signal(signal.SIGTERM, self._on_term)
        finally:
            if self._terminated:
                sys.exit(_TERMINATED)

    def device(self, name: str) -> str:
        """What `--device` means here: of "auto", cuda where there are GPUs. Connects, if there is an address."""
        if name != "auto":
            return name
        if self.address is None:
            return "cuda" if torch.cuda.is_available() else "cpu"
        self.connect()
        return "cuda" if self.total("GPU") else "cpu"

    def connect(self) -> None:
        """Connects, or starts; nothing if that is done. Raises UsageError where the cluster cannot be had."""
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing goes out unasked
        address = os.environ.get("RAY_ADDRESS", "auto") if self.address == "auto" else self.address
        started = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE} if address is None else {}
        if address is None:
            self._before = psutil.Process().children(recursive=True)
        elif address != "auto":
            _probe(address)
        handled = threading.current_thread() is threading.main_thread()
        if handled:
            self._on_term = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
        try:
            ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **started)
        except (Exception, SystemExit) as error:  # other versions, a missing token; Ray ends the process after a while
            if isinstance(error, SystemExit) and error.code == signal.SIGTERM:  # as Ray answers it
                sys.exit(_TERMINATED)
            raise UsageError(
                f"{self} cannot be used: {one_line(error)}. Look at it with `ray status`; if it asks for a token, set "
                f"RAY_AUTH_MODE=token, with the token in RAY_AUTH_TOKEN or ~/.ray/auth_token. Without --ray_address "
                f"one is started here."
            ) from error
        if handled:
            signal.signal(signal.SIGTERM, self._terminate)  # Ray's own handler aborts, and tells where it was

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        """Ends as Ctrl-C does, by the one exception of a handler that Ray's waits pass on as it is."""
        self._terminated = True
        raise KeyboardInterrupt

    @property
    def machines(self) -> int:
        """How many there are."""
        return len(self._by_machine("CPU"))

    def total(self, kind: str) -> int:
        """How many GPUs or CPUs the machines have together."""
        return sum(self._by_machine(kind))

    def free(self, kind: str) -> int:
        """How many of them nobody holds."""
        return int(ray.available_resources().get(kind, 0))

    def threads(self, sharing: int) -> int:
        """CPU threads for each of so many workers, as evenly as they can be had on one machine."""
        return max(1, min(self.total("CPU") // sharing, max(self._by_machine("CPU"))))

    def check_room(self, workers: int, kind: str, each: int) -> None:
        """Raises UsageError, with the numbers, if so many workers of `each` GPUs or CPUs can never run at once."""
        there = self._by_machine(kind)
        if sum(count // each for count in there) < workers:
            machines = f"{len(there)} machine{'s' * (len(there) != 1)} with {' + '.join(map(str, there))}"
            together = f", {each} each on one machine" if each > 1 else ""
            raise UsageError(
                f"{workers} workers need {workers * each} {kind}s{together}; {self} has {sum(there)} "
                f"({machines}). Ask for fewer --workers, or add machines."
            )

    def _by_machine(self, kind: str) -> list[int]:
        return [int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"]]

    def __str__(self) -> str:
        if self.address is None:
            return "this machine, as a Ray cluster,"
        return f"the Ray cluster at {self.address}" if self.address != "auto" else "the running Ray cluster"


def _probe(address: str) -> None:
    """Ray itself tries for two minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(
            f"No Ray cluster answers at {address} ({one_line(error)}). Start one with `ray start --head`, and give "
            f"the HOST:PORT that it prints as --ray_address."
        ) from error
