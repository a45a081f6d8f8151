"""From the start of a process to the first token of its first prompt: ours and transformers', each its own process."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from sparsecache.bench.lines import Line
from sparsecache.bench.models import SHAPES, folder_of, load_subject
from sparsecache.bench.modes import each_peer, free_memory
from sparsecache.engine.devices import find_device
from sparsecache.engine.loading import DTYPES
from sparsecache.errors import one_line

_READ = 2**24  # bytes at a time


def startup(model: str, device: str, dtype: str, tokens: int, peers: list[str]) -> Iterator[Line]:
    """Seconds of a first run, for which kernels are compiled, and of a second; beside transformers', if it is a peer.

    A shape's random weights are saved to a temporary folder before. Both engines find the files in the page cache.
    """
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        if model in SHAPES:
            load_subject(model, [find_device(device)], DTYPES[dtype]).save(folder)
            free_memory()
        else:
            folder = folder_of(model)
        _read_through(folder)
        cache = str(Path(scratch) / "triton")
        job = [str(folder), device, dtype, str(tokens)]
        ours = [_first_token("sparsecache", job, cache) for _ in range(2)]
        theirs = each_peer(peers, lambda peer: [_first_token(peer, job, cache) for _ in range(2)])
    for number, what in enumerate(("first run", "second run")):
        notes = {"stages": ours[number], "peers_stages": {peer: runs[number] for peer, runs in theirs.items()}}
        seconds = {peer: runs[number]["first token"] for peer, runs in theirs.items()}
        yield Line(f"start to first token, {tokens} tokens, {what}", ours[number]["first token"], None, seconds, notes)


def _read_through(folder: Path) -> None:
    """Reads all weights once, so that no engine finds them colder than another."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(_READ):
                pass


def _first_token(engine: str, job: list[str], cache: str) -> dict[str, float]:
    """What a process tells of itself, in seconds from its start."""
    command = [sys.executable, "-m", "sparsecache.bench.first_token", repr(time.time()), engine, *job]
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{engine} did not start: {one_line(RuntimeError(done.stderr[-500:]))}")
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told
