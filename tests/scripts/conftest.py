"""A sweep over a tiny checkpoint, run by a script of the repository in a process of its own."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from sparsecache.testing.random_checkpoint import make_random_checkpoint

ARGUMENTS = ["--data", "sample", "--datasets", "qasper,lcc", "--sample_rows", "2", "--sample_tokens", "256"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three layers, each KV head read by two heads."""
    return make_random_checkpoint(
        tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=3, num_key_value_heads=2, initializer_range=0.2
    )


@pytest.fixture(scope="session")
def sweep(
    run_python: Callable[..., "CompletedProcess[str]"], repo: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple["CompletedProcess[str]", Path]]:
    """Runs a script over [[methods]] tables, returns what it said and the folder that it wrote into."""

    def run(script: str, model: Path, *methods: dict[str, Any]) -> tuple["CompletedProcess[str]", Path]:
        folder = tmp_path_factory.mktemp("sweep")
        lines = [f"models = {json.dumps([str(model)])}", f"arguments = {json.dumps(ARGUMENTS)}"]
        for method in methods:
            lines += ["[[methods]]", *(f"{key} = {_toml(value)}" for key, value in method.items())]
        file = folder / "sweep.toml"
        file.write_text("\n".join(lines))
        told = run_python(
            repo / "scripts" / script, file, "--pred_dir", folder / "pred", "--out", folder / "out",
            env={"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return told, folder

    return run


def _toml(value: Any) -> str:
    return "inf" if value == float("inf") else json.dumps(value)
