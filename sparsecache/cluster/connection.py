"""Connects to a Ray cluster or starts one, checks its size, and stops what it started."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import psutil
import ray
import torch

from sparsecache.configs import project_dir
from sparsecache.errors import UsageError, one_line

_OBJECT_STORE = 128 * 2**20  # bytes; only prompts pass through it
_PROBE_S = 5.0
_CONNECT_S = 30.0  # Ray itself retries for minutes
_START_S = 120.0
_TERMINATED = 128 + signal.SIGTERM  # the exit code


class Cluster:
    """A Ray cluster at an address, or (None) a local one that is started on first use."""

    def __init__(self, address: str | None):
        self.address = address
        self._children_before: list[psutil.Process] | None = None  # child processes before Ray started its own
        self._previous_sigterm: Any = None
        self._terminated = False
        self._connecting: _Connecting | None = None

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pending = self._connecting is not None and self._connecting.pending
        try:
            if self._previous_sigterm is not None:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # already shutting down
            children = [] if self._children_before is None else psutil.Process().children(recursive=True)
            if not pending:
                ray.shutdown()
            if self._connecting is not None:
                self._connecting.stop.set()
            for child in children:
                if child not in (self._children_before or ()):  # they would wait a minute for the head node
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            if self._previous_sigterm is not None:
                signal.signal(signal.SIGTERM, self._previous_sigterm)
        finally:
            if self._terminated and pending:
                os._exit(_TERMINATED)  # the interpreter's own exit may crash while Ray still connects in a thread
            if self._terminated:
                sys.exit(_TERMINATED)

    def device(self, name: str) -> str:
        """Resolves `--device`: "auto" is cuda where the cluster has GPUs. Connects if there is an address."""
        if name != "auto":
            return name
        if self.address is None:
            return "cuda" if torch.cuda.is_available() else "cpu"
        self.connect()
        return "cuda" if self.total("GPU") else "cpu"

    def connect(self) -> None:
        """Connects to the cluster or starts it, once. Raises UsageError if that fails or takes too long.

        SIGTERM ends the process at any time from here on, also while Ray connects.
        """
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send nothing unasked
        address = self.address
        if address == "auto":
            address = os.environ.get("RAY_ADDRESS") or _running_address()
        if address is None:
            self._children_before = psutil.Process().children(recursive=True)
        elif address != "auto":
            _probe(address)
        self._handle_sigterm()
        connecting = self._connecting
        if connecting is None or not connecting.pending:
            connecting = self._connecting = _Connecting(address)
        self._await(connecting, _START_S if address is None else _CONNECT_S)

    def _await(self, connecting: "_Connecting", seconds: float) -> None:
        _make_absolute("RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR")
        # Ray puts the current folder on every worker's import path, where a torch.py would be run as torch.
        with contextlib.chdir(project_dir()):
            if not connecting.is_alive():
                connecting.start()
            deadline = time.monotonic() + seconds
            while not connecting.done.wait(0.2) and time.monotonic() < deadline:
                self._handle_sigterm()
        self._handle_sigterm()
        if connecting.pending:
            raise UsageError(
                f"{self} did not answer within {seconds:.0f} s. Check it with `ray status`, start it again with "
                f"`ray stop` and `ray start --head`, or leave out --ray_address to start a local one."
            )
        error = connecting.error
        if isinstance(error, Exception | SystemExit):  # another version of Ray, a missing token, ...
            raise UsageError(
                f"{self} cannot be used: {one_line(error)}. Check it with `ray status`. If it asks for a token, set "
                f"RAY_AUTH_MODE=token, with the token in RAY_AUTH_TOKEN or ~/.ray/auth_token. Without --ray_address "
                f"a local cluster is started."
            ) from error
        if error is not None:
            raise error

    def _handle_sigterm(self) -> None:
        """Takes SIGTERM over, also from the handler that Ray sets while it connects, which prints a stack trace."""
        if threading.current_thread() is threading.main_thread():
            if self._previous_sigterm is None:
                self._previous_sigterm = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
            signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        """Ends as Ctrl-C does: KeyboardInterrupt is the one exception that passes through Ray's waits unchanged."""
        self._terminated = True
        raise KeyboardInterrupt

    @property
    def machines(self) -> int:
        """Returns the number of machines."""
        return len(self._by_machine("CPU"))

    def total(self, kind: str) -> int:
        """Returns the number of GPUs or CPUs of all machines; kind: "GPU" or "CPU"."""
        return sum(self._by_machine(kind))

    def free(self, kind: str) -> int:
        """Returns the number of GPUs or CPUs that no process has reserved."""
        return int(ray.available_resources().get(kind, 0))

    def threads(self, num_workers: int) -> int:
        """Returns the CPU threads per worker if `num_workers` workers share the cluster, at most those of a machine."""
        return max(1, min(self.total("CPU") // num_workers, max(self._by_machine("CPU"))))

    def check_capacity(self, workers: int, kind: str, per_worker: int) -> None:
        """Raises UsageError, with the numbers, if `workers` workers do not fit; kind: "GPU" or "CPU"."""
        counts = self._by_machine(kind)
        if sum(count // per_worker for count in counts) < workers:
            machines = f"{len(counts)} machine{'s' * (len(counts) != 1)} with {' + '.join(map(str, counts))}"
            on_one_machine = f", {per_worker} each on one machine" if per_worker > 1 else ""
            raise UsageError(
                f"{workers} workers need {workers * per_worker} {kind}s{on_one_machine}; {self} has {sum(counts)} "
                f"({machines}). Ask for fewer --workers, or add machines."
            )

    def _by_machine(self, kind: str) -> list[int]:
        return [int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"]]

    def __str__(self) -> str:
        if self.address is None:
            return "this machine, as a Ray cluster,"
        return f"the Ray cluster at {self.address}" if self.address != "auto" else "the running Ray cluster"


class _Connecting(threading.Thread):
    """Runs ray.init in a second thread, so that the main thread can handle signals and time out.

    The thread stays until `stop` is set: the kernel kills the processes of a local cluster with the thread that
    started them.
    """

    def __init__(self, address: str | None):
        super().__init__(name="ray.init", daemon=True)
        self.error: BaseException | None = None
        self.done, self.stop = threading.Event(), threading.Event()
        self._address = address

    @property
    def pending(self) -> bool:
        """Whether ray.init still runs."""
        return self.is_alive() and not self.done.is_set()

    def run(self) -> None:
        local = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE} if self._address is None else {}
        try:
            ray.init(self._address or "local", log_to_driver=False, logging_level="ERROR", **local)
        except BaseException as error:  # raised again by the main thread
            self.error = error
        self.done.set()
        self.stop.wait()


def _running_address() -> str:
    """The address of the cluster that runs on this machine, as Ray finds it for "auto"; else "auto"."""
    try:
        from ray._private.services import canonicalize_bootstrap_address

        return canonicalize_bootstrap_address("auto") or "auto"
    except Exception:  # none found, or a Ray without this function: ray.init says what is wrong
        return "auto"


def _make_absolute(*variables: str) -> None:
    """Makes paths in these environment variables independent of the current folder."""
    for name in variables:
        if path := os.environ.get(name):
            os.environ[name] = os.path.abspath(path)


def _probe(address: str) -> None:
    """Raises UsageError if nothing listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(
            f"No Ray cluster answers at {address} ({one_line(error)}). Start one with `ray start --head`, and give "
            f"the HOST:PORT that it prints as --ray_address."
        ) from error
