"""Times the start of a process to its first token, for this engine and transformers, each in its own process."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from sparsecache.bench.models import SHAPES, checkpoint_path, load_bench_model
from sparsecache.bench.results import Result
from sparsecache.bench.timing import free_memory, measure_baselines
from sparsecache.engine.devices import find_device
from sparsecache.engine.loading import DTYPES
from sparsecache.errors import one_line

_READ_BYTES = 2**24


def startup(model: str, device: str, dtype: str, tokens: int, baselines: list[str]) -> Iterator[Result]:
    """Yield the seconds of a first start, which compiles kernels, and of a second one.

    A shape's random weights are first saved to a temporary folder. All processes find the files in the page cache.
    """
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        if model in SHAPES:
            load_bench_model(model, [find_device(device)], DTYPES[dtype]).save(folder)
            free_memory()
        else:
            folder = checkpoint_path(model)
        _fill_page_cache(folder)
        triton_cache = str(Path(scratch) / "triton")
        arguments = [str(folder), device, dtype, str(tokens)]

        def start_twice(engine: str) -> list[dict[str, float]]:
            return [_start(engine, arguments, triton_cache) for _ in range(2)]

        own = start_twice("sparsecache")
        others = measure_baselines(baselines, start_twice)
    for index, which in enumerate(("first", "second")):
        baseline_stages = {name: runs[index] for name, runs in others.items()}
        yield Result(
            f"start to first token, {tokens} tokens, {which} start",
            own[index]["first token"],
            baselines={name: stages["first token"] for name, stages in baseline_stages.items()},
            notes={"stages": own[index], "baseline_stages": baseline_stages},
        )


def _fill_page_cache(folder: Path) -> None:
    """Read all weights once, so that every process finds them equally warm."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(_READ_BYTES):
                pass


def _start(engine: str, arguments: list[str], triton_cache: str) -> dict[str, float]:
    """Start a process and return the seconds to each of its stages."""
    command = [sys.executable, "-m", "sparsecache.bench.first_token", repr(time.time()), engine, *arguments]
    environment = {**os.environ, "TRITON_CACHE_DIR": triton_cache}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"Could not start {engine}: {one_line(RuntimeError(process.stderr[-500:]))}")
    stages: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return stages
