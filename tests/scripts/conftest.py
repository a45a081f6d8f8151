"""Sweeps over a tiny checkpoint, by the scripts of the repository."""

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sparsecache.testing.random_checkpoint import make_random_checkpoint

ROWS = ["--data", "sample", "--datasets", "qasper,lcc", "--sample_rows", "2", "--sample_tokens", "256"]
ARGUMENTS = [*ROWS, "--max_new_tokens", "24"]
Sweep = Callable[..., tuple[Result, Path]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three layers, each KV head read by two heads."""
    return make_random_checkpoint(
        tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=3, num_key_value_heads=2, initializer_range=0.2
    )


@pytest.fixture(scope="session")
def load_script(repo: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script, which may import its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(repo / "scripts")
        yield importlib.import_module


@pytest.fixture(scope="session")
def sweep_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a sweep of a model over [[methods]] tables into a folder of its own."""

    def write(model: Path, *methods: dict[str, Any]) -> Path:
        lines = [f"models = {json.dumps([str(model)])}", f"arguments = {json.dumps(ARGUMENTS)}"]
        for method in methods:
            lines += ["[[methods]]", *(f"{key} = {_toml(value)}" for key, value in method.items())]
        file = tmp_path_factory.mktemp("sweep") / "sweep.toml"
        file.write_text("\n".join(lines))
        return file

    return write


@pytest.fixture(scope="session")
def sweep(load_script: Callable[[str], ModuleType], sweep_file: Callable[..., Path]) -> Sweep:
    """Runs a script over [[methods]] tables; returns its result and the folder that it wrote into."""

    def run(script: str, model: Path, *methods: dict[str, Any]) -> tuple[Result, Path]:
        file = sweep_file(model, *methods)
        folder = file.parent
        arguments = [str(file), "--pred_dir", str(folder / "pred"), "--out", str(folder / "out")]
        return CliRunner().invoke(load_script(script).main, arguments), folder

    return run


def _toml(value: Any) -> str:
    return "inf" if value == float("inf") else json.dumps(value)
