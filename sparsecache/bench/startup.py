"""From the start of a process to the first token of its first prompt: ours and transformers', each its own process.

As a module it is such a process: `python -m sparsecache.bench.startup BEGAN ENGINE FOLDER DEVICE DTYPE TOKENS`.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from sparsecache.bench.lines import Line
from sparsecache.bench.models import SHAPES, load_subject
from sparsecache.bench.modes import Job, free_memory
from sparsecache.engine.catalog import checkpoint_folder, find_model
from sparsecache.engine.loading import DTYPES
from sparsecache.errors import one_line
from sparsecache.plan import Plan, find_device
from sparsecache.settings import ENGINES, Settings

_NEW_TOKENS = 64  # for which room is made


def startup(model: str, device: str, dtype: str, tokens: int, peers: bool) -> Iterator[Line]:
    """Seconds of a first run, for which kernels are compiled, and of a second; beside transformers' with `peers`.

    A shape's random weights are saved to a temporary folder before. Both engines find the files in the page cache.
    """
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        if model in SHAPES:
            load_subject(model, [find_device(device)], DTYPES[dtype]).save(folder)
            free_memory()
        else:
            folder = Path(checkpoint_folder(find_model(model), offline=False, weights=True))
        caches = {"TRITON_CACHE_DIR": str(Path(scratch) / "triton")}
        found: dict[str, list[dict[str, float]]] = {}
        for engine in ENGINES[: 1 + peers]:
            job = [engine, str(folder), device, dtype, str(tokens)]
            found[engine] = [_first_token(job, caches) for _ in range(2)]
    for number, what in enumerate(("first run", "second run")):
        notes = {engine: runs[number] for engine, runs in found.items()}
        ours, *others = (told["first token"] for told in notes.values())
        peer = dict(zip(("transformers",), others, strict=False))
        yield Line(f"start to first token, {tokens} tokens, {what}", ours, None, peer, notes)


def _first_token(job: list[str], caches: dict[str, str]) -> dict[str, float]:
    """What a process tells of itself, in seconds from its start."""
    command = [sys.executable, "-m", "sparsecache.bench.startup", repr(time.time()), *job]
    done = subprocess.run(command, env={**os.environ, **caches}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{job[0]} did not start: {one_line(RuntimeError(done.stderr[-500:]))}")
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def _run(began: float, engine_name: str, folder: str, device: str, dtype: str, tokens: int) -> dict[str, float]:
    told = {"imports": time.time() - began}
    settings = Settings(folder, device=device, dtype=dtype, engine=engine_name)
    plan = Plan(settings)
    engine = plan.engine(settings.slots(plan.device.type))
    told["weights"] = time.time() - began
    engine.reserve(tokens + _NEW_TOKENS)
    told["room"] = time.time() - began
    vocabulary = int(plan.checkpoint.config.get_text_config().vocab_size)
    (done,) = engine.generate(Job(tokens, 1).requests(vocabulary))
    if done.error:
        raise RuntimeError(done.error)
    told["first token"] = time.time() - began
    return told


if __name__ == "__main__":
    _began, _engine, _folder, _device, _dtype, _tokens = sys.argv[1:]
    print(json.dumps(_run(float(_began), _engine, _folder, _device, _dtype, int(_tokens))))
