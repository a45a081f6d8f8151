"""One worker without Ray: fed call by call, it does what its engine does alone."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsecache.cache import FullCache
from sparsecache.cluster import worker as module
from sparsecache.cluster.work_queue import Assigned, WorkQueue
from sparsecache.cluster.worker import Worker, WorkerConfig
from sparsecache.engine.base import Completion, Request
from sparsecache.engine.generator import Generator
from sparsecache.errors import UsageError
from sparsecache.runner.context import RunContext
from sparsecache.runner.engine_loader import EngineLoader
from sparsecache.runner.settings import Settings
from sparsecache.versions import installed_versions

SLOTS = 3


@pytest.fixture
def settings(tiny) -> Settings:
    return Settings(model=str(tiny), device="cpu", batch_size=SLOTS, workers=2)


@pytest.fixture
def loader(settings) -> EngineLoader:
    return EngineLoader(settings, RunContext(settings).identity(), installed_versions(), 100)


@pytest.fixture
def config(loader) -> WorkerConfig:
    return WorkerConfig(loader, 1, os.getcwd())


@pytest.fixture
def worker(config) -> Worker:
    made = Worker()
    assert made.load(config).pid == os.getpid()
    return made


def _requests(count: int) -> list[Request]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(5, 40, (count,), generator=generator).tolist()
    ids = [torch.randint(3, 1024, (length,), generator=generator).tolist() for length in lengths]
    return [Request(f"row {at}", each, 3 + 7 * at % 11, ()) for at, each in enumerate(ids)]


def _drive(worker: Worker, requests: list[Request]) -> dict[str, Completion]:
    """As workers.py does: a call for each completion, one more under way than is being answered."""
    queue, assigned, calls, found = WorkQueue(requests, 1, SLOTS), Assigned(), [], {}
    while True:
        while len(calls) < 2:
            tickets = queue.take(assigned)
            if not tickets and len(calls) >= len(assigned.requests):
                break
            calls.append(tickets)
        if not calls:
            assert queue.empty and not assigned.requests
            return found
        reply = worker.process(calls.pop(0))
        assert reply.completion is not None and reply.completion.request.token_ids == []
        found[assigned.requests.pop(reply.ticket).key] = reply.completion


def _steps(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> list[int]:
    """How many sequences each decode step of `run` had."""
    seen, whole = [], Generator._launch
    with monkeypatch.context() as patch:
        patch.setattr(Generator, "_launch", lambda self, rows: seen.append(len(rows)) or whole(self, rows))
        run()
    return seen


def test_a_worker_decodes_in_the_same_batches_as_an_engine_alone(worker, settings, monkeypatch) -> None:
    requests, found = _requests(20), {}
    worker.reserve(60)
    steps = _steps(monkeypatch, lambda: found.update(_drive(worker, requests)))
    alone = {}
    engine = RunContext(Settings(model=settings.model, device="cpu", batch_size=SLOTS)).engine(100)
    engine.reserve(60)
    steps_alone = _steps(monkeypatch, lambda: alone.update({c.key: c.token_ids for c in engine.generate(requests)}))
    assert {key: completion.token_ids for key, completion in found.items()} == alone and len(alone) == 20
    assert steps == steps_alone and max(steps) == SLOTS


def test_rows_that_come_after_the_last_one_are_done_too(worker) -> None:
    first, second = _requests(2)
    assert worker.process([]).completion is None
    reply = worker.process([(7, first)])
    assert (reply.ticket, len(reply.completion.token_ids)) == (7, first.max_new_tokens)
    reply = worker.process([(9, second)])
    assert reply.ticket == 9 and reply.stats.prefill_tokens == len(first.token_ids) + len(second.token_ids)
    assert worker.process([]).completion is None


def test_what_a_failing_row_writes_to_stderr_comes_back_with_its_error(worker, monkeypatch) -> None:
    def fail(self: FullCache, *arguments: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(FullCache, "prefill", fail)
    reply = worker.process([(0, _requests(1)[0])])
    assert reply.completion.error == "RuntimeError: broken" and "Traceback" in reply.stderr


def test_a_worker_whose_device_answers_no_more_ends_itself_and_others_do_not(worker, monkeypatch) -> None:
    ended = []
    monkeypatch.setattr(module.os, "_exit", ended.append)
    module._exit_if_device_is_broken(torch.device("cpu"))
    assert ended == []
    module._exit_if_device_is_broken(torch.device("meta"))  # holds nothing that could be read
    assert ended == [1]


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"versions": {"torch": "1.0"}}, ["torch: 1.0, now ", "the same on every machine"]),
        ({"identity": {"checkpoint": "other"}}, ["the checkpoint's files: not the same", "the same checkpoint"]),
    ],
    ids=["version", "checkpoint"],
)
def test_another_version_or_checkpoint_than_the_drivers_is_refused(changed, parts, loader, config) -> None:
    with pytest.raises(UsageError) as error:
        Worker().load(replace(config, load_engine=replace(loader, **changed)))
    assert all(part in str(error.value) for part in (*parts, os.uname().nodename))


def test_relative_paths_are_relative_to_the_drivers_folder(loader, tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = replace(loader, settings=replace(loader.settings, model=tiny.name))
    assert Worker().load(WorkerConfig(relative, 1, str(tiny.parent))).node == os.uname().nodename
    assert Path.cwd() == tiny.parent
