"""Downloading data with the real hub client from a local server."""

import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from sparsecache.longbench.tasks import load_tasks

MAIN, OLD = "1" * 40, "2" * 40
COMMITS = {"main": MAIN, MAIN: MAIN, "v0": OLD, OLD: OLD}
ZIP = "/datasets/THUDM/LongBench/resolve/main/data.zip"
V2 = "/datasets/THUDM/LongBench-v2"
TASK = load_tasks()["multifieldqa_en"]

# Loads the dataset from the hub's zip and prints what became of it.
SCRIPT = """
import json, sys
from sparsecache.errors import UsageError
from sparsecache.synthetic.source import SampleSource
from sparsecache.longbench.data import load_rows, open_source
from sparsecache.longbench.tasks import load_tasks
asked = json.loads(sys.argv[1])
try:
    source = open_source("hub", sample=SampleSource(), **asked)
    name = "longbench_v2" if "longbench_v2" in asked.get("benchmarks", ()) else "multifieldqa_en"
    rows = load_rows(source, load_tasks()[name])
    print(json.dumps({"first": rows.dataset[0]["context"], "n": len(rows.dataset), **source.describe()}))
except UsageError as error:
    print(json.dumps({"error": str(error)}))
"""


def data_zip(rows: int, context: str) -> bytes:
    made = [
        {
            "input": "Who?",
            "context": context,
            "answers": ["Nobody"],
            "length": 2,
            "dataset": TASK.name,
            "language": "en",
            "all_classes": None,
            "_id": str(number),
        }
        for number in range(rows)
    ]
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(f"data/{TASK.name}.jsonl", "".join(json.dumps(row) + "\n" for row in made))
    return content.getvalue()


@dataclass
class Hub:
    """The state of a server: the zip of each commit of LongBench, the file of LongBench v2, the requests received."""

    zips: dict[str, bytes] = field(default_factory=dict)
    v2: bytes = b""
    requests: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    def take(self) -> list[tuple[str, str]]:
        """Return the requests for data since the last call. The client also sends other requests."""
        taken, self.requests = self.requests, []
        return [(method, path) for method, path in taken if not path.startswith("/api/agent-")]

    def received_any(self) -> bool:
        """Return whether any request came since the last `take`."""
        return bool(self.requests)


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.hub.requests.append((self.command, self.path))
        parts = self.path.split("/")  # /datasets/THUDM/LongBench/resolve/<revision>/data.zip
        commit = COMMITS.get(parts[5]) if parts[1:3] == ["datasets", "THUDM"] and parts[4] == "resolve" else None
        files = {
            ("LongBench", "data.zip"): self.hub.zips.get(commit or "", b""),
            ("LongBench-v2", "data.json"): self.hub.v2,
        }
        content = files.get((parts[3], parts[-1]), b"") if commit else b""
        if not content:
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound" if len(parts) == 7 else "RepoNotFound")
            self.send_header("X-Error-Message", "Invalid rev id")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", str(commit))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub({MAIN: data_zip(150, "new"), OLD: data_zip(150, "old")})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": made}))
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


Load = Callable[..., dict[str, Any]]


@pytest.fixture
def load(hub: Hub, tmp_path: Path, run_python: Callable[..., CompletedProcess[str]]) -> Load:
    """Return a function that loads the dataset in a new process with its own hub cache."""

    def run(**arguments: Any) -> dict[str, Any]:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "", "NO_PROXY": "127.0.0.1"}
        env |= {name: str(tmp_path / "hf" / name) for name in ("HF_HUB_CACHE", "HF_XET_CACHE", "HF_DATASETS_CACHE")}
        done = run_python("-c", SCRIPT, json.dumps(arguments), env=env)
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    return run


def test_data_is_downloaded_once_and_recorded(hub: Hub, load: Load) -> None:
    first = load()
    assert hub.take() == [("HEAD", ZIP), ("GET", ZIP)]
    assert (first["first"], first["n"]) == ("new", 150)
    assert (first["source"], first["repo"], first["commit"], first["revision"]) == (
        "hub",
        "THUDM/LongBench",
        MAIN,
        None,
    )
    assert first["sha256"] == hashlib.sha256(hub.zips[MAIN]).hexdigest()
    assert load() == first
    assert hub.take() == [("HEAD", ZIP)]
    assert load(offline=True) == first
    assert hub.received_any() is False


def test_v2_is_downloaded_from_its_own_repository(hub: Hub, load: Load) -> None:
    texts = dict.fromkeys(("question", "choice_A", "choice_B", "choice_C", "choice_D"), "x")
    row = {**texts, "answer": "A", "difficulty": "easy", "length": "long", "context": "new"}
    hub.v2 = json.dumps([{**row, "_id": str(number)} for number in range(503)]).encode()
    found = load(benchmarks=["longbench_v2"])
    assert [path for _, path in hub.take()] == 2 * [f"{V2}/resolve/main/data.json"]
    assert (found["first"], found["n"], found["repo"], found["commit"]) == ("new", 503, "THUDM/LongBench-v2", MAIN)
    assert found["sha256"] == hashlib.sha256(hub.v2).hexdigest()
    both = load(benchmarks=["longbench", "longbench_v2"])
    assert (both["longbench"]["repo"], both["longbench_v2"]) == (
        "THUDM/LongBench",
        {key: found[key] for key in both["longbench_v2"]},
    )
    assert load(benchmarks=["longbench_v2"], offline=True) == found
    error = load(benchmarks=["longbench", "longbench_v2"], revision="v0")["error"]
    assert error.startswith("--data_revision v0 would apply to 2 repositories")


@pytest.mark.parametrize("revision", ["v0", OLD])
def test_a_revision_pins_the_commit(hub: Hub, load: Load, revision: str) -> None:
    pinned = load(revision=revision)
    assert (pinned["first"], pinned["commit"], pinned["revision"]) == ("old", OLD, revision)
    assert hub.take() == [(method, ZIP.replace("main", revision)) for method in ("HEAD", "GET")]
    assert load(revision=revision, offline=True) == pinned
    assert hub.received_any() is False


def test_offline_with_an_empty_cache_is_an_error_without_requests(hub: Hub, load: Load) -> None:
    error = load(offline=True)["error"]
    assert error.startswith("data.zip of THUDM/LongBench at revision main is not in the hub's cache")
    assert error.endswith("Run once without --offline, or name a folder or zip with --data.")
    assert hub.received_any() is False


def test_an_unknown_revision_is_an_error(hub: Hub, load: Load) -> None:
    error = load(revision="nowhere")["error"]
    assert "Could not download data.zip of THUDM/LongBench (404" in error
    assert error.endswith("Check the network and --data_revision, or name a folder or zip with --data.")
    assert hub.received_any()


def test_a_wrong_row_count_is_refused(hub: Hub, load: Load) -> None:
    hub.zips[MAIN] = data_zip(149, "short")
    error = load()["error"]
    assert "data.zip:data/multifieldqa_en.jsonl holds 149 rows; the published dataset has 150." in error
