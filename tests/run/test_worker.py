"""One worker without Ray: fed call by call, it does what its engine does alone."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsecache.cluster import worker as module
from sparsecache.cluster.handout import Handout, Load
from sparsecache.cluster.worker import Orders, Worker
from sparsecache.engine.base import Completion, Request
from sparsecache.engine.generator import Generator
from sparsecache.errors import UsageError
from sparsecache.methods.vanilla import Vanilla
from sparsecache.plan import Plan
from sparsecache.settings import Settings
from sparsecache.versions import installed_versions

SLOTS = 3


@pytest.fixture
def settings(tiny) -> Settings:
    return Settings(model=str(tiny), device="cpu", batch_size=SLOTS, workers=2)


@pytest.fixture
def orders(settings) -> Orders:
    plan = Plan(settings)
    return Orders(settings, plan.identity(), installed_versions(), 100, 1, os.getcwd())


@pytest.fixture
def worker(orders) -> Worker:
    made = Worker()
    assert made.load(orders).pid == os.getpid()
    return made


def _requests(count: int) -> list[Request]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(5, 40, (count,), generator=generator).tolist()
    ids = [torch.randint(3, 1024, (length,), generator=generator).tolist() for length in lengths]
    return [Request(f"row {at}", each, 3 + 7 * at % 11, ()) for at, each in enumerate(ids)]


def _drive(worker: Worker, requests: list[Request]) -> dict[str, Completion]:
    """As workers.py does: a call for each completion, one more under way than is being answered."""
    handout, load, calls, found = Handout(requests, 1, SLOTS), Load(), [], {}
    while True:
        while len(calls) < 2:
            handed = handout.take(load)
            if not handed and len(calls) >= len(load.requests):
                break
            calls.append(handed)
        if not calls:
            assert handout.empty and not load.requests
            return found
        reply = worker.work(calls.pop(0))
        assert reply.completion is not None and reply.completion.request.token_ids == []
        found[load.requests.pop(reply.ticket).key] = reply.completion


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
    engine = Plan(Settings(model=settings.model, device="cpu", batch_size=SLOTS)).engine(100)
    engine.reserve(60)
    steps_alone = _steps(monkeypatch, lambda: alone.update({c.key: c.token_ids for c in engine.generate(requests)}))
    assert {key: completion.token_ids for key, completion in found.items()} == alone and len(alone) == 20
    assert steps == steps_alone and max(steps) == SLOTS


def test_rows_that_come_after_the_last_one_are_done_too(worker) -> None:
    first, second = _requests(2)
    assert worker.work([]).completion is None
    reply = worker.work([(7, first)])
    assert (reply.ticket, len(reply.completion.token_ids)) == (7, first.max_new_tokens)
    reply = worker.work([(9, second)])
    assert reply.ticket == 9 and reply.clock.prefill_tokens == len(first.token_ids) + len(second.token_ids)
    assert worker.work([]).completion is None


def test_what_a_failing_row_writes_to_stderr_comes_back_with_its_error(worker, monkeypatch) -> None:
    def fail(self: Vanilla, *arguments: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Vanilla, "prefill", fail)
    reply = worker.work([(0, _requests(1)[0])])
    assert reply.completion.error == "RuntimeError: broken" and "Traceback" in reply.said


def test_a_worker_whose_device_answers_no_more_ends_itself_and_others_do_not(worker, monkeypatch) -> None:
    ended = []
    monkeypatch.setattr(module.os, "_exit", ended.append)
    module._end_if_broken(torch.device("cpu"))
    assert ended == []
    module._end_if_broken(torch.device("meta"))  # holds nothing that could be read
    assert ended == [1]


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"versions": {"torch": "1.0"}}, ["torch is ", "not 1.0", "the same on every machine"]),
        ({"identity": {"checkpoint": "other"}}, ["checkpoint is ", "not other", "the same checkpoint"]),
    ],
    ids=["version", "checkpoint"],
)
def test_another_version_or_checkpoint_than_the_drivers_is_refused(changed, parts, orders) -> None:
    with pytest.raises(UsageError) as error:
        Worker().load(replace(orders, **changed))
    assert all(part in str(error.value) for part in (*parts, os.uname().nodename))


def test_relative_paths_are_relative_to_the_drivers_folder(orders, tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = replace(orders.settings, model=tiny.name)
    assert Worker().load(replace(orders, settings=relative, folder=str(tiny.parent))).node == os.uname().nodename
    assert Path.cwd() == tiny.parent
