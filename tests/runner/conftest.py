"""Runs of a tiny checkpoint over the sample, in this process, and how their files are read."""

import importlib
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from longbench_pred import main
from sparsecache.engine.loading import Checkpoint
from sparsecache.testing.random_checkpoint import make_random_checkpoint

Rows = list[dict[str, Any]]


@pytest.fixture(scope="session")
def endless(tmp_path_factory) -> Path:
    """A checkpoint that decodes fast and says various things, as long as it may."""
    return make_random_checkpoint(
        tmp_path_factory.mktemp("endless") / "tiny",
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
    )


@pytest.fixture(scope="session")
def tiny(endless, tmp_path_factory) -> Path:
    """The same checkpoint with every 16th token a stop token, so that most answers are short."""
    folder = shutil.copytree(endless, tmp_path_factory.mktemp("model") / "tiny")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [1, *range(16, 1024, 16)]}))
    return folder


@pytest.fixture
def command(tiny, tmp_path) -> Callable[..., list[str]]:
    """A command line over three rows of the sample's qasper; later options win."""

    def make(*arguments: str) -> list[str]:
        return [
            *("--model", str(tiny), "--datasets", "qasper", "--data", "sample", "--sample_rows", "3"),
            *("--sample_tokens", "256", "--device", "cpu", "--pred_dir", str(tmp_path / "pred"), *arguments),
        ]

    return make


@pytest.fixture
def predict(command) -> Callable[..., Result]:
    """Runs the command line in this process."""
    return lambda *arguments: CliRunner().invoke(main, command(*arguments))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where the run lies."""
    return tmp_path / "pred" / "tiny" / "vanilla"


@pytest.fixture(scope="session")
def schema() -> dict[str, Any]:
    """The keys of a finished row and their types."""
    return {
        "pred": str, "answers": list, "all_classes": list | None, "length": int, "_id": str, "prompt_tokens": int,
        "original_tokens": int, "truncated": bool, "recut_tokens": int, "prompt_sha256": str,
        "prompt_ids_sha256": str, "prompt_end": str,
        "new_tokens": int, "finish_reason": str, "prefill_s": float, "decode_s": float,
    }  # fmt: skip


@pytest.fixture(scope="session")
def read_rows() -> Callable[[Path], Rows]:
    """Reads a prediction file."""

    def read(path: Path) -> Rows:
        content = path.read_text(encoding="utf-8")
        assert content.endswith("\n")
        return [json.loads(line) for line in content[:-1].split("\n")]

    return read


@pytest.fixture(scope="session")
def read_untimed(read_rows) -> Callable[[Path], Rows]:
    """Reads a prediction file without what differs from run to run."""
    times = ("prefill_s", "decode_s")
    return lambda path: [{key: value for key, value in row.items() if key not in times} for row in read_rows(path)]


@pytest.fixture(scope="session")
def read_record() -> Callable[[Path], dict[str, Any]]:
    """Reads a run's record."""
    return lambda folder: json.loads((folder / "run.json").read_text(encoding="utf-8"))


@pytest.fixture
def forbid_weights(monkeypatch) -> Callable[[], None]:
    """From its call on, whoever loads weights fails."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("weights were loaded")

    return lambda: monkeypatch.setattr(Checkpoint, "load", refuse)


@pytest.fixture
def add_method(tmp_path, monkeypatch) -> Iterator[Callable[[str], Any]]:
    """Puts `mine.py` beside the methods for one test: a class Mine(Vanilla) with this body; returns the module."""
    import sparsecache.methods

    home = tmp_path / "methods"
    home.mkdir()
    monkeypatch.setattr(sparsecache.methods, "__path__", [*sparsecache.methods.__path__, str(home)])

    def add(body: str) -> Any:
        head = "from sparsecache.methods.vanilla import Vanilla as Base\n\n\nclass Mine(Base):\n"
        (home / "mine.py").write_text(head + textwrap.indent(textwrap.dedent(body), "    "))
        return importlib.import_module("sparsecache.methods.mine")

    yield add
    sys.modules.pop("sparsecache.methods.mine", None)
