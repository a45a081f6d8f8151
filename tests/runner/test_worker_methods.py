"""A worker loads a method of one's own from the driver's folder, and only the version that the driver has."""

import os
from pathlib import Path

import pytest

from sparsecache.cluster.worker import Worker, WorkerConfig
from sparsecache.engine.base import Request
from sparsecache.errors import UsageError
from sparsecache.runner.context import RunContext
from sparsecache.runner.engine_loader import EngineLoader
from sparsecache.runner.settings import Settings
from sparsecache.versions import installed_versions

SOURCE = '''"""Keeps the smallest keys."""

from dataclasses import dataclass

from sparsecache.cache import EvictionMethod


@dataclass
class Mine(EvictionMethod):
    def score(self, q, k, v):
        return -k.norm(dim=2)
'''


def test_a_worker_takes_a_method_by_a_path_relative_to_the_driver(tiny, tmp_path, monkeypatch) -> None:
    driver, elsewhere = tmp_path / "driver", tmp_path / "elsewhere"
    for folder in (driver, elsewhere):
        folder.mkdir()
    method = driver / "methods" / "mine.py"
    method.parent.mkdir()
    method.write_text(SOURCE)
    monkeypatch.chdir(driver)
    path = os.path.join("methods", "mine.py")
    options = {"budget": "4", "dense_layers": "0"}
    settings = Settings(model=str(tiny), device="cpu", workers=2, method=path, options=options)
    loader = EngineLoader(settings, RunContext(settings).identity(), installed_versions(), 100)
    config = WorkerConfig(loader, 1, str(Path.cwd()))

    monkeypatch.chdir(elsewhere)
    worker = Worker()
    worker.load(config)
    worker.reserve(60)
    completion = worker.process([(0, Request("row", list(range(3, 43)), 5, ()))]).completion
    assert completion is not None and completion.error is None
    assert completion.report["kept"] < 0.2 and completion.report["sparse_steps"] == 4

    method.write_text(SOURCE.replace("-k.norm", "k.norm"))  # as on a machine with another version
    monkeypatch.chdir(elsewhere)
    with pytest.raises(UsageError, match="the content of the file that method names: not the same"):
        Worker().load(config)
