"""Runs over a Ray cluster on this machine: the rows they write, deaths of workers and drivers, refusals.

In one file because starting a Ray cluster is slow, and its tests share one.
"""

import importlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sparsecache.cache import FullCache
from sparsecache.cluster.work_queue import MAX_ATTEMPTS
from sparsecache.cluster.worker import Worker

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra [ray]")
psutil = pytest.importorskip("psutil", reason="needs the extra [ray]")
DATASETS = ("qasper", "trec", "lcc")
ROWS = 30
PREDICT = "longbench_pred.py"
MANY = ("--datasets", ",".join(DATASETS), "--sample_rows", str(ROWS))


@pytest.fixture(scope="session")
def tiny(endless) -> Path:
    """The runs must last until they are killed."""
    return endless


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """A cluster of two CPUs and no GPU, which only these tests have the token of."""
    assert "ray" not in sys.modules  # it reads these variables when it is imported
    with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        token = tmp_path_factory.mktemp("ray") / "token"
        token.write_text(f"{random.getrandbits(256):064x}")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        free.close()
        what = ["--head", f"--port={port}", "--num-cpus=2", "--num-gpus=0", "--include-dashboard=false", "--block"]
        store = f"--object-store-memory={128 * 2**20}"
        script = Path(sys.executable).with_name("ray")
        head = subprocess.Popen([script, "start", *what, store], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        children = []
        try:
            assert head.stdout is not None
            for line in head.stdout:
                if b"Ray runtime started" in line:
                    break
            threading.Thread(target=head.stdout.read, daemon=True).start()  # or it stops at a full pipe
            children = psutil.Process(head.pid).children(recursive=True)
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()
            head.wait(20)
            psutil.wait_procs(children, 1)
            for child in children:
                if child.is_running():
                    child.kill()


@pytest.fixture
def whole(predict, folder, read_untimed) -> dict[str, dict[str, Any]]:
    """What one process writes: rows by dataset and id."""
    assert predict(*MANY, "--name", "whole").exit_code == 0
    return _by_id(folder.parent / "whole", read_untimed)


def _by_id(folder: Path, read: Callable[[Path], list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    found = {}
    for dataset in DATASETS:
        rows = read(folder / f"{dataset}.jsonl")
        found[dataset] = {row["_id"]: row for row in rows}
        assert len(rows) == len(found[dataset])
    return found


def _workers(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [worker for session in record.get("sessions", []) for worker in session.get("workers", [])]


def test_workers_killed_at_random_moments_lose_no_row_and_write_none_twice(
    address, predict, folder, whole, monkeypatch, read_untimed, read_record
) -> None:
    monkeypatch.setattr("sparsecache.runner.run._SAVE_EVERY_S", 0.0)
    seed, killed, done = random.randrange(10**6), [], threading.Event()
    draw = random.Random(seed)

    def kill() -> None:
        while len(killed) < 2 and not done.wait(draw.uniform(0.05, 0.5)):
            alive = [w["pid"] for w in _workers(_record_or_none(folder, read_record)) if w["pid"] not in killed]
            if alive:
                killed.append(draw.choice(alive))
                os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    told = predict(*MANY, "--workers", "2", "--ray_address", address)
    done.set()
    killer.join()
    assert told.exit_code == 0, (seed, told.output)
    assert _by_id(folder, read_untimed) == whole, seed
    workers = _workers(read_record(folder))
    assert len(killed) == 2 and {w["pid"] for w in workers if w["died"]} == set(killed), (seed, workers)
    assert sum(w["rows"] for w in workers) == 3 * ROWS and {w["worker"] for w in workers} <= {1, 2}
    assert all(w["node"] == os.uname().nodename and w["seconds"] > 0 for w in workers if w["rows"])
    for pid in killed:
        assert f"(process {pid}) died, it is replaced" in told.stderr
    assert f"Workers: {3 * ROWS} rows in " in told.stdout and "; 2 died." in told.stdout
    clock = read_record(folder)["sessions"][0]["clock"]
    assert clock["decode_tokens"] >= sum(row["new_tokens"] - 1 for rows in whole.values() for row in rows.values()) // 2


def _record_or_none(folder: Path, read_record: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    return read_record(folder) if (folder / "run.json").exists() else {}


def test_a_row_that_kills_three_workers_is_an_error_row_and_the_next_run_retries_it(
    address, predict, folder, monkeypatch, read_untimed, read_record
) -> None:
    from ray import cloudpickle

    deadly = 0  # set below, before the class travels

    class Deadly(Worker):
        def load(self, config):
            whole = FullCache.prefill

            def prefill(cache, slot, q, k, v):
                if k.shape[1] == deadly:
                    os.kill(os.getpid(), signal.SIGKILL)
                whole(cache, slot, q, k, v)

            FullCache.prefill = prefill
            return super().load(config)

    arguments = ("--sample_rows", "12", "--workers", "2", "--ray_address", address, "--batch_size", "2")
    assert predict("--sample_rows", "12", "--name", "whole").exit_code == 0
    expected = read_untimed(folder.parent / "whole" / "qasper.jsonl")
    lengths = [row["prompt_tokens"] for row in expected]
    deadly = max(lengths)  # is among the first to be handed out, so that each death is seen to be one on it
    assert lengths.count(deadly) == 1
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr("sparsecache.runner.ray_workers.Worker", Deadly)
    told = predict(*arguments)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert told.exit_code == 1, told.output
    rows = {row["_id"]: row for row in read_untimed(folder / "qasper.jsonl")}
    failed = {key: row for key, row in rows.items() if "error" in row}
    ((row_id, row),) = failed.items()
    assert row["prompt_tokens"] == deadly and row["error"].startswith("WorkerDied: 3 workers died on this row")
    assert sum(worker["died"] for worker in _workers(read_record(folder))) == MAX_ATTEMPTS
    monkeypatch.undo()
    told = predict("--sample_rows", "12")
    assert told.exit_code == 0 and "1 of 12 to do" in told.stdout
    rows = {row["_id"]: row for row in read_untimed(folder / "qasper.jsonl")}
    assert rows == {row["_id"]: row for row in expected} and row_id in rows


def test_a_killed_driver_leaves_a_run_that_goes_on_with_workers(
    address, command, predict, folder, whole, repo, read_untimed
) -> None:
    process = _start(repo, PREDICT, *command(*MANY, "--workers", "2", "--ray_address", address))
    _await_rows(process, folder, 5)
    process.kill()
    process.communicate()
    kept = _count(folder)
    assert 5 <= kept < 3 * ROWS
    told = predict(*MANY, "--workers", "2", "--ray_address", address)
    assert told.exit_code == 0 and f"{3 * ROWS - kept} of {3 * ROWS} to do" in told.stdout, told.output
    assert _by_id(folder, read_untimed) == whole


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
def test_a_signal_ends_everything_within_ten_seconds(sent, command, folder, predict, repo) -> None:
    process = _start(repo, PREDICT, *command(*MANY, "--workers", "2"))
    _await_rows(process, folder, 3)
    started = psutil.Process(process.pid).children(recursive=True)
    assert {"raylet", "gcs_server"} <= {child.name() for child in started}
    began = time.monotonic()
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does
    else:
        process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(started, timeout=max(0, 10 - (time.monotonic() - began)))
    assert time.monotonic() - began < 10 and not alive
    assert process.returncode == 128 + sent
    assert ("Stopped. Finished rows are kept" in stderr) == (sent == signal.SIGINT)
    assert "Traceback" not in stderr and "SIGTERM" not in stderr
    before = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
    assert predict(*MANY, "--max_samples", "1").exit_code == 0
    for name, content in before.items():
        assert (folder / name).read_bytes().startswith(content)


def test_sigterm_ends_a_driver_that_waits_in_ray(repo) -> None:
    code = """
import ray, time
from sparsecache.cluster.connection import Cluster
with Cluster(None) as cluster:
    cluster.connect()
    nap = ray.remote(lambda: time.sleep(60)).remote()
    print("waits", flush=True)
    ray.get(nap)
"""
    process = _start(repo, "-c", code)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        time.sleep(1)  # where Ray asks for signals itself, not Python
        process.terminate()
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert not stderr
    assert process.returncode == 128 + signal.SIGTERM


def _start(repo: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Python, in the project's folder and in a session of its own."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=repo,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repo)},
        start_new_session=True,
    )


def _count(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))


def _await_rows(process: "subprocess.Popen[str]", folder: Path, rows: int) -> None:
    deadline = time.monotonic() + 100
    while _count(folder) < rows:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--workers", "64", "--device", "cpu"], ["64 workers need 64 CPUs", "has 2 (1 machine with 2)", "--workers"]),
        (["--workers", "2", "--device", "cuda"], ["2 workers need 2 GPUs", "has 0 (1 machine with 0)"]),
    ],
    ids=["CPUs", "GPUs"],
)
def test_a_cluster_with_too_few_is_refused_with_the_numbers(arguments, parts, address, predict, folder) -> None:
    began = time.monotonic()
    told = predict(*arguments, "--ray_address", address)
    assert told.exit_code == 2 and time.monotonic() - began < 15
    (error,) = (line for line in told.stderr.splitlines() if line.startswith("Error: "))
    assert all(part in error for part in (*parts, address))
    assert _count(folder) == 0


def test_a_refusal_leaves_the_rows_that_overwrite_would_delete(address, predict, folder) -> None:
    assert predict().exit_code == 0
    before = (folder / "qasper.jsonl").read_bytes()
    for arguments in (["--workers", "64", "--ray_address", address], ["--ray_address", "127.0.0.1:9"]):
        assert predict(*arguments, "--device", "cpu", "--overwrite").exit_code == 2
        assert (folder / "qasper.jsonl").read_bytes() == before


def test_overwrite_keeps_the_old_rows_where_workers_cannot_load(address, predict, folder, tiny, tmp_path) -> None:
    broken = shutil.copytree(tiny, tmp_path / "broken" / "tiny")
    arguments = ("--model", str(broken), "--workers", "1", "--ray_address", address)
    assert predict("--model", str(broken)).exit_code == 0
    before = (folder / "qasper.jsonl").read_bytes()
    (broken / "model.safetensors").write_bytes(b"")
    told = predict(*arguments, "--overwrite")
    assert told.exit_code == 2 and "model.safetensors" in told.stderr, told.output
    assert (folder / "qasper.jsonl").read_bytes() == before


def test_an_address_where_no_cluster_answers_is_refused_at_once(predict) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        began = time.monotonic()
        told = predict("--ray_address", address)
    assert told.exit_code == 2 and time.monotonic() - began < 10
    assert f"Error: No Ray cluster answers at {address}" in told.stderr and "ray start --head" in told.stderr


def test_a_worker_that_finds_another_checkpoint_is_refused(address, predict, folder, monkeypatch) -> None:
    from sparsecache.runner.context import RunContext

    whole = RunContext.identity
    monkeypatch.setattr(RunContext, "identity", lambda self: {**whole(self), "checkpoint": "mine"})
    told = predict("--ray_address", address)
    assert told.exit_code == 2
    assert "the checkpoint's files: not the same" in told.stderr and "the same checkpoint" in told.stderr
    assert "mine" not in told.stderr  # hashes are not shown


def test_workers_import_what_the_driver_finds_by_its_path(address, predict, tmp_path, monkeypatch) -> None:
    from ray import cloudpickle

    class Needy(Worker):
        def load(self, config):
            importlib.import_module("only_here")
            return super().load(config)

    (tmp_path / "only_here.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("sparsecache.runner.ray_workers.Worker", Needy)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    told = predict("--sample_rows", "3", "--workers", "1", "--ray_address", address)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert told.exit_code == 0, told.output


def test_a_finished_run_needs_no_cluster(predict, monkeypatch) -> None:
    assert predict().exit_code == 0
    monkeypatch.setattr("sparsecache.cluster.connection.Cluster.connect", lambda self: pytest.fail("connected"))
    assert predict("--workers", "2", "--device", "cpu").exit_code == 0


def test_the_import_path_of_a_worker_has_absolute_folders_only(monkeypatch, tmp_path, repo) -> None:
    from sparsecache.cluster.workers import _import_path

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ":/a::b:.")
    assert _import_path() == os.pathsep.join([str(repo), "/a", str(tmp_path / "b"), str(tmp_path)])
    monkeypatch.delenv("PYTHONPATH")
    assert _import_path() == str(repo)
