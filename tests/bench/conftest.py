"""The bench's command line over a tiny checkpoint, with measurements as short as they can be."""

import gc
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sparsecache.testing.random_checkpoint import make_random_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 4 layers, 4 heads, 2 KV heads of 16 channels, 64 hidden channels, in float32."""
    return make_random_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def imported_modules_are_not_searched() -> None:
    """The bench collects garbage after each measurement, which takes 0.2 s if it searches what tests imported."""
    gc.freeze()


@pytest.fixture
def bench(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs scripts/bench.py with arguments."""
    monkeypatch.setattr("sparsecache.bench.roofline._SECONDS", 0.001)
    monkeypatch.setattr("sparsecache.bench.roofline._COPY_BYTES", {"cpu": 2**16})
    monkeypatch.setattr("sparsecache.bench.timing._MAX_RUNS", 1)
    spec = importlib.util.spec_from_file_location("bench", repo / "scripts" / "bench.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: CliRunner().invoke(module.main, [str(argument) for argument in arguments])


@pytest.fixture
def decode(
    bench: Callable[..., Result], tiny: Path, tmp_path: Path
) -> Callable[..., tuple[Result, list[dict[str, Any]]]]:
    """Runs mode decode over the tiny checkpoint on the CPU; returns what it printed and the saved results."""

    def run(*arguments: Any) -> tuple[Result, list[dict[str, Any]]]:
        done = bench("decode", "--model", tiny, "--device", "cpu", "--out", tmp_path, *arguments)
        file = tmp_path / "decode-tiny.json"
        return done, json.loads(file.read_text())["results"] if file.exists() else []

    return run
