"""What tests of several folders share: the repository, real data where there is some, fresh interpreters."""

import gc
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# A shared machine has slow moments, which say nothing of the code.
settings.register_profile("sparsecache", deadline=None)
settings.load_profile("sparsecache")

_REPO = Path(__file__).resolve().parent.parent

_LONGEST_FILES = [  # first, so that the other process does not wait for one of them at the end
    "runner/test_workers.py",
    "methods/test_contract.py",
    "bench/test_modes.py",
    "examples/test_training.py",
    "test_real_model.py",
    "demo/test_baseline.py",
    "longbench/test_hub.py",
    "runner/test_connection.py",
    "runner/test_kills.py",
    "kernels/test_decode.py",
    "kernels/test_gather.py",
    "kernels/test_linear.py",
    "kernels/test_speculation.py",
    "methods/test_split.py",
    "engine/test_parity.py",
    "api/test_api.py",
    "scripts/test_sweep.py",
    "test_packaging.py",
]

# Threads on shared cores wait for each other. The variable is for processes that tests start, and for pytest's workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels are first imported: their tests run them on the CPU


def pytest_collection_finish() -> None:
    gc.freeze()  # else each full collection would search all imported modules, for tenths of a second


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else libraries report at exit what was not freed


def pytest_runtest_setup() -> None:
    torch.set_num_threads(1)  # a test may have set more


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if torch.cuda.is_initialized() and (nextitem is None or nextitem.path != item.path):
        gc.collect()
        torch.cuda.empty_cache()  # other processes of pytest share the GPU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {_REPO / "tests" / name: rank for rank, name in enumerate(_LONGEST_FILES)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from the user's cache folder, or written there, by tests and the interpreters they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSECACHE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _functions_of_kernels_are_prepared_once() -> Iterator[None]:
    """Triton's interpreter prepares a function at each call from a kernel, which takes half of its time."""
    if "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    prepare_and_call = InterpretedFunction.__call__
    prepared = set()

    def call(function: Any, *arguments: Any, **options: Any) -> Any:
        if function.fn in prepared:
            return function.rewrite()(*arguments, **options)
        prepared.add(function.fn)
        return prepare_and_call(function, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", call)
        yield


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of this repository."""
    return _REPO


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Real LongBench rows and predictions, which never lie in the repository."""
    folder = Path(os.environ.get("SPARSECACHE_FIXTURES", _REPO.parent / "shared" / "longbench"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; SPARSECACHE_FIXTURES names its folder")
    return folder


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python *arguments` with the repository importable, `path` before it and `env` on top."""

    def run(
        *arguments: str | Path, path: tuple[Path, ...] = (), env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        search = os.pathsep.join(map(str, (*path, _REPO)))
        environment = {**os.environ, "PYTHONPATH": search, "COLUMNS": "200", **(env or {})}
        environment.pop("TRITON_INTERPRET", None)
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=120,
            **options,
        )

    return run
