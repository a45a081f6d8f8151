"""Connecting to a Ray cluster: what workers may import, and that every wait has an end."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra [ray]")
CONNECT = """
import sys
from sparsecache.cli import report_usage_errors
from sparsecache.cluster import connection
connection._CONNECT_S = float(sys.argv[2])
with report_usage_errors(), connection.Cluster(sys.argv[1]) as cluster:
    print("connecting", flush=True)
    cluster.connect()
"""


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never says anything."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def start(repo: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """Starts Python with these arguments."""

    def run(*arguments: str, **env: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(repo), **env},
        )

    return run


def test_a_server_that_does_not_answer_is_refused_in_time(start, silent) -> None:
    process = start("-c", CONNECT, silent, "1")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    assert f"Error: the Ray cluster at {silent} did not answer within 1 s." in stderr and "Traceback" not in stderr


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_process_that_connects(sent, code, start, silent) -> None:
    process = start("-c", CONNECT, silent, "60")
    assert process.stdout is not None and process.stdout.readline() == "connecting\n"
    time.sleep(2)
    began = time.monotonic()
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code and time.monotonic() - began < 10 and "Traceback" not in stderr, stderr


def test_the_address_of_a_cluster_that_is_gone_is_refused_at_once(start, tmp_path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        gone = f"127.0.0.1:{unused.getsockname()[1]}"
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(gone)
        # Clusters of other tests, found by their processes, do not count.
        alone = "import ray._private.services as s; s._find_address_from_flag = lambda flag: set()"
        process = start("-c", f"{alone}\n{CONNECT}", "auto", "60", RAY_TMPDIR=str(tmp_path), RAY_ADDRESS="")
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and "Error: No Ray cluster answers at " in stderr, stderr
    assert gone.rpartition(":")[2] in stderr


def test_nothing_in_the_current_folder_is_imported(command, tiny, tmp_path, repo) -> None:
    foreign, ran = tmp_path / "foreign", tmp_path / "ran"
    foreign.mkdir()
    for module in ("torch", "sparsecache", "transformers", "numpy", "ray", "sitecustomize"):
        code = f"open({str(ran)!r}, 'a').write({module!r}); raise ImportError('the wrong {module}')"
        (foreign / f"{module}.py").write_text(code)
    told = subprocess.run(
        [sys.executable, str(repo / "longbench_pred.py"), *command("--workers", "2")],
        cwd=foreign,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    assert not ran.exists()
    assert (tmp_path / "pred" / "tiny" / "vanilla" / "qasper.jsonl").read_text().count("\n") == 3
