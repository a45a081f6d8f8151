"""The generator and failures: an error fails its own sequences alone, and too little memory shrinks the batch."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig
from sparsecache.cache.full import FullCache
from sparsecache.cache.stats import SequenceStats
from sparsecache.engine.base import Completion, Request
from sparsecache.engine.generator import Generator
from sparsecache.engine.steps import _raise_out_of_memory
from sparsecache.methods.vanilla import Vanilla

BAD = 13  # tokens of a prompt that fails
ERRORS = [ValueError("too odd\nsecond line"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")]
OnCall = Callable[[str, list[int], int], None]  # what is called, in which slots, for how many tokens


class _Hooked(Vanilla):
    """Calls a function, which may raise, before the caches are made, and before each call to the second layer's."""

    def __init__(self, on_call: OnCall) -> None:
        super().__init__()
        self.on_call = on_call

    def make_cache(self, layer: int, config: CacheConfig) -> FullCache:
        if layer != 1:
            return super().make_cache(layer, config)
        self.on_call("allocate", list(range(config.slots)), config.max_tokens)
        return _HookedCache(self, config)

    def report(self, stats: SequenceStats) -> dict[str, Any]:
        self.on_call("report", [stats.slot], stats.steps)
        return {}


class _HookedCache(FullCache):
    def __init__(self, method: _Hooked, config: CacheConfig) -> None:
        super().__init__(config)
        self._method = method

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._method.on_call("prefill", [slot], k.shape[1])
        super().prefill(slot, q, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        out = super().attend(q, k, v, slots)
        self._method.on_call("attend", slots.tolist(), 1)
        return out

    def free_slot(self, slot: int) -> None:
        self._method.on_call("free", [slot], 0)


class _Faulty(_Hooked):
    """Raises an error in one call for sequences whose prompt has BAD tokens."""

    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__(self._call)
        self.where, self._error = where, error
        self._bad: set[int] = set()

    def _call(self, what: str, slots: list[int], tokens: int) -> None:
        if what == "prefill" and tokens == BAD:
            self._bad.update(slots)
        if what == self.where and (tokens == BAD + 10 if what == "allocate" else self._bad.intersection(slots)):
            raise self._error
        if what in ("free", "allocate"):
            self._bad.difference_update(slots)


@pytest.fixture(scope="module")
def folder(make_checkpoint):
    return make_checkpoint()


def _run(engine: Generator, *requests: Request) -> dict[int, Completion]:
    return {completion.key: completion for completion in engine.generate(requests)}


def _same(first: Completion, second: Completion) -> bool:
    return replace(first, prefill_s=0, decode_s=0) == replace(second, prefill_s=0, decode_s=0)


@pytest.fixture(scope="module")
def eight(folder, make_engine, make_prompts) -> tuple[list[Request], dict[int, Completion]]:
    """Return eight requests, two of them bad, and their completions, each alone in an engine without a fault."""
    prompts = make_prompts(9, 6, 4, BAD, 8, 12, BAD, 7)
    requests = [Request(key, prompt, 10, ()) for key, prompt in enumerate(prompts)]
    return requests, {request.key: _run(make_engine(folder), request)[request.key] for request in requests}


@pytest.mark.parametrize("error", ERRORS, ids=["ValueError", "OutOfMemoryError"])
@pytest.mark.parametrize("where", ["prefill", "attend", "report", "allocate"])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_failing_request_becomes_an_error_and_leaves_the_others_alone(
    where, error, slots, folder, make_engine, eight, capfd
) -> None:
    requests, alone = eight
    method = _Faulty(where, error)
    engine = make_engine(folder, slots, method)
    if where != "allocate":
        engine.reserve(30)
    found = _run(engine, *requests)
    assert found.keys() == alone.keys()
    failed = {key for key, completion in found.items() if completion.error}
    bad = {request.key for request in requests if len(request.token_ids) == BAD}
    assert failed >= (bad if where != "allocate" else {3})
    if slots == 1 or where in ("prefill", "report"):  # a step fails for all that are in flight
        assert failed <= bad
    assert len(failed) < len(requests) - 2
    for key, completion in found.items():
        if completion.error:
            assert completion.error == f"{type(error).__name__}: {str(error).splitlines()[0]}"
            assert (completion.token_ids, completion.finish_reason) == ([], "")
        else:
            assert _same(completion, alone[key])
    assert "Traceback" in capfd.readouterr().err

    method.where = "nowhere"  # a failure leaves nothing behind
    again = _run(engine, *requests)
    assert all(_same(again[key], alone[key]) for key in alone)
    assert json.dumps([completion.report for completion in again.values()])


def test_tokens_of_failed_requests_are_not_counted(folder, make_engine, make_prompts) -> None:
    engine, counts = make_engine(folder, 1, _Faulty("prefill", ERRORS[0])), []
    requests = [Request(key, prompt, 3, ()) for key, prompt in enumerate(make_prompts(BAD, 5))]
    done = list(engine.generate(requests, counts.append))
    assert done[0].error and not done[1].error
    assert sum(counts) == 3
    assert engine.stats.prefill_tokens == 5


def test_caches_that_do_not_fit_are_allocated_anew_request_by_request(folder, make_engine, make_prompts) -> None:
    engine = make_engine(folder, 1, _Faulty("allocate", ERRORS[1]))
    engine.reserve(BAD + 10)
    (done,) = engine.generate([Request(0, make_prompts(5)[0], 10, ())])
    assert done.error is None


def test_an_empty_prompt_or_a_token_outside_the_vocabulary_is_an_error(folder, make_engine, make_prompts) -> None:
    good = make_prompts(5)[0]
    requests = [Request(0, [], 5, ()), Request(1, [3, 999999], 5, ()), Request(2, good, 5, ())]
    done = _run(make_engine(folder), *requests)
    assert done[0].error and done[1].error and not done[2].error


def test_an_interrupt_is_raised(folder, make_engine, make_prompts) -> None:
    engine = make_engine(folder, 1, _Faulty("attend", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        list(engine.generate([Request(0, make_prompts(BAD)[0], 5, ())]))


@pytest.mark.parametrize("where", ["allocate", "prefill", "attend"])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_out_of_memory_shrinks_the_batch_and_goes_on(
    where, most, folder, make_engine, our_texts, make_prompts, capfd
) -> None:
    """There is memory for `most` sequences: to allocate for, to hold, or to decode together."""
    prompts, allocated = make_prompts(9, 30, 4, 17, 12), []
    alone = our_texts(make_engine(folder), prompts, 10)

    def on_call(what: str, slots: list[int], tokens: int) -> None:
        if what == "allocate":
            allocated.append(len(slots))
        if what == where and (max(slots) >= most if what == "prefill" else len(slots) > most):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    engine = make_engine(folder, 5, _Hooked(on_call))
    engine.reserve(40)
    assert our_texts(engine, prompts, 10) == alone
    assert allocated[0] == 5 and 1 <= allocated[-1] <= most
    assert ("out of memory" in capfd.readouterr().err) == (where != "allocate")
    engine.reserve(40)  # the next dataset may fit again
    assert allocated[-1] == 5 or where == "allocate"


def test_a_step_that_fails_at_its_end_still_joins_its_streams(folder, make_engine, make_prompts, monkeypatch) -> None:
    """Otherwise the capture of a step without memory for its logits fails with an error that hides why."""
    engine = make_engine(folder, 1)
    decoder, joined = engine._decoder, []
    decoder.allocate(1, 9, 4)
    decoder.prefill(torch.tensor(make_prompts(5)[0]), 0)
    monkeypatch.setattr(decoder.cache, "join", lambda: joined.append(True))
    monkeypatch.setattr(decoder, "_lm_head", _raise(torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(torch.OutOfMemoryError):
        decoder.step(torch.tensor([3]), torch.tensor([5]), torch.tensor([0]))
    assert joined


def test_an_error_of_a_capture_that_means_too_little_memory_is_named_so() -> None:
    unjoined = torch.AcceleratorError("CUDA error: capturing stream has unjoined work\nSearch for it")
    for error in (torch.AcceleratorError("CUDA error: out of memory\nSearch for it"), unjoined):
        unjoined.__context__ = torch.OutOfMemoryError("CUDA out of memory.")  # what failed in the captured step
        with pytest.raises(torch.OutOfMemoryError, match="while a decode step was captured"), _raise_out_of_memory():
            raise error
    other = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(torch.AcceleratorError) as raised, _raise_out_of_memory():
        raise other
    assert raised.value is other


def _raise(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail
