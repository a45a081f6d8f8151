"""The generator: stop rules, slots, allocation, and its stats. What it does about failures: test_failures.py."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig
from sparsecache.cache.full import FullCache
from sparsecache.cache.stats import SequenceStats
from sparsecache.engine.base import Completion, Request
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.generator import Generator
from sparsecache.methods.snapkv import SnapKV
from sparsecache.methods.vanilla import Vanilla

STOPS = (5, 1)


@pytest.fixture(scope="module")
def folder(make_checkpoint):
    return make_checkpoint()


@pytest.fixture(scope="module")
def free_text(folder, make_engine, our_texts, make_prompts) -> Callable[[int], tuple[list[int], list[int]]]:
    """Return a prompt of some length, and the 40 tokens that follow it when nothing stops them."""

    def text(length: int) -> tuple[list[int], list[int]]:
        (prompt,) = make_prompts(length, seed=length)
        return prompt, our_texts(make_engine(folder), [prompt], 40)[0]

    return text


def _run(engine: Generator, *requests: Request) -> dict[int, Completion]:
    return {completion.key: completion for completion in engine.generate(requests)}


def _same(first: Completion, second: Completion) -> bool:
    return replace(first, prefill_s=0, decode_s=0) == replace(second, prefill_s=0, decode_s=0)


@pytest.mark.parametrize("slots", [1, 3])
def test_the_attention_plan_of_the_next_prompt_is_made_while_one_is_read(
    slots, folder, make_engine, make_prompts, monkeypatch
) -> None:
    seen: list[tuple[str, int]] = []
    original = Decoder.prefill

    def prefill(decoder, token_ids, slot):
        seen.append(("prompt", len(token_ids)))
        return original(decoder, token_ids, slot)

    monkeypatch.setattr(Decoder, "prefill", prefill)
    monkeypatch.setattr(Decoder, "warm_attention_plan", lambda decoder, tokens: seen.append(("plan", tokens)))
    lengths = (9, 30, 4, 17)
    requests = [Request(at, prompt, 5, ()) for at, prompt in enumerate(make_prompts(*lengths))]
    assert len(_run(make_engine(folder, slots), *requests)) == len(lengths)
    expected = [each for first, then in pairwise(lengths) for each in (("prompt", first), ("plan", then))]
    assert seen == [*expected, ("prompt", lengths[-1])]


def test_a_plan_that_cannot_be_made_fails_no_prompt(folder, make_engine, make_prompts, monkeypatch) -> None:
    def fail(decoder, tokens):
        raise RuntimeError("no memory left for a plan")

    monkeypatch.setattr(Decoder, "warm_attention_plan", fail)
    done = _run(make_engine(folder), *(Request(at, prompt, 5, ()) for at, prompt in enumerate(make_prompts(9, 30))))
    assert [completion.error for completion in done.values()] == [None, None]


def test_a_text_ends_with_the_first_stop_id(folder, make_engine, free_text) -> None:
    prompt, text = free_text(20)
    at = next(at for at in range(5, 40) if text[at] not in text[:at])
    done = _run(make_engine(folder), Request(0, prompt, 40, (2000, text[at])))[0]
    assert done.token_ids == text[: at + 1]
    assert (done.finish_reason, done.error) == ("stop", None)


def test_a_text_ends_at_the_cap_without_a_stop_id(folder, make_engine, free_text) -> None:
    prompt, text = free_text(20)
    for cap in (1, 2, 17):
        done = _run(make_engine(folder), Request(0, prompt, cap, (2000,)))[0]
        assert done.token_ids == text[:cap]
        assert done.finish_reason == "length"


def test_a_stop_id_at_the_cap_counts_as_stop(folder, make_engine, free_text) -> None:
    prompt, text = free_text(20)
    cap = next(at for at in range(3, 40) if text[at] not in text[:at]) + 1
    assert _run(make_engine(folder), Request(0, prompt, cap, (text[cap - 1],)))[0].finish_reason == "stop"


def test_a_stop_id_at_the_first_token_ends_at_once(folder, make_engine, free_text) -> None:
    prompt, text = free_text(20)
    done = _run(make_engine(folder), Request(0, prompt, 40, (text[0],)))[0]
    assert (done.token_ids, done.finish_reason) == (text[:1], "stop")
    assert done.prefill_s > 0


@pytest.mark.parametrize("slots", [1, 3])
def test_stop_ids_are_masked_before_the_minimum_as_in_transformers(
    slots, folder, make_engine, free_text, load_reference
) -> None:
    """The newline that ends a samsum answer must not be its first token."""
    prompt, text = free_text(20)
    stops = (text[0], 1)
    done = _run(make_engine(folder, slots), Request(0, prompt, 12, stops, 1), Request(1, prompt, 12, stops, 4))
    for key, minimum in ((0, 1), (1, 4)):
        out = load_reference(folder).generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, min_new_tokens=minimum, eos_token_id=list(stops)
        )
        assert done[key].token_ids == out[0, len(prompt) :].tolist()
        assert not set(done[key].token_ids[:minimum]) & set(stops)


def test_stop_ids_outside_the_vocabulary_never_match_and_never_fail(folder, make_engine, free_text) -> None:
    prompt, text = free_text(20)
    done = _run(make_engine(folder), Request(0, prompt, 9, (1024, 70000), 1))[0]
    assert (done.error, done.token_ids) == (None, text[:9])


def test_requests_of_very_different_lengths_at_batch_3_equal_batch_1(folder, make_engine, make_prompts) -> None:
    lengths = (3, 300, 40, 1, 150, 9, 77, 2)
    caps = (30, 2, 11, 25, 1, 40, 5, 16)
    requests = [
        Request(key, prompt, cap, STOPS)
        for key, (prompt, cap) in enumerate(zip(make_prompts(*lengths), caps, strict=True))
    ]
    alone = {request.key: _run(make_engine(folder), request)[request.key] for request in requests}
    assert {done.finish_reason for done in alone.values()} >= {"length"}
    for slots, reserve, order in ((1, 0, -1), (1, 400, 1), (3, 0, 1), (3, 0, -1), (3, 400, 1), (3, 400, -1)):
        engine = make_engine(folder, slots)
        if reserve:
            engine.reserve(reserve)
        found = _run(engine, *requests[::order])
        assert found.keys() == alone.keys()
        assert all(_same(found[key], alone[key]) for key in alone)


class _Watched(Vanilla):
    """Records allocations, the slots that are filled and freed, and which of them a step names together."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[tuple[int, int]] = []
        self.filled: list[int] = []
        self.freed: list[int] = []
        self.together: list[list[int]] = []

    def make_cache(self, layer: int, config: CacheConfig) -> FullCache:
        if layer > 0:
            return super().make_cache(layer, config)
        assert sorted(self.filled) == sorted(self.freed), "caches were allocated anew under a sequence in flight"
        self.allocated.append((config.slots, config.max_tokens))
        return _WatchedCache(self, config)

    def report(self, stats: SequenceStats) -> dict[str, Any]:
        return {"slot": stats.slot, "tokens": stats.prompt_tokens + stats.steps}


class _WatchedCache(FullCache):
    def __init__(self, method: _Watched, config: CacheConfig) -> None:
        super().__init__(config)
        self._method = method

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._method.filled.append(slot)
        super().prefill(slot, q, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        self._method.together.append(slots.tolist())
        return super().attend(q, k, v, slots)

    def free_slot(self, slot: int) -> None:
        self._method.freed.append(slot)


def test_slots_are_shared_reused_and_freed(folder, make_engine, make_prompts) -> None:
    method = _Watched()
    engine = make_engine(folder, 2, method)
    engine.reserve(40)
    requests = [Request(key, prompt, 4 + key, ()) for key, prompt in enumerate(make_prompts(9, 8, 7, 6, 5))]
    done = _run(engine, *requests)
    assert method.allocated == [(2, 40)]
    assert sorted(method.filled) == sorted(method.freed) and set(method.filled) == {0, 1}
    assert [0, 1] in [sorted(slots) for slots in method.together]
    assert all(len(set(slots)) == len(slots) for slots in method.together)
    for request in requests:  # the newest token is in no cache
        assert done[request.key].report["tokens"] == len(request.token_ids) + request.max_new_tokens - 1


def test_caches_grow_for_a_longer_request_when_nothing_is_in_flight(folder, make_engine, make_prompts) -> None:
    method = _Watched()
    requests = [Request(key, prompt, 5, ()) for key, prompt in enumerate(make_prompts(10, 10, 60, 20))]
    done = _run(make_engine(folder, 2, method), *requests)
    assert [done[key].error for key in range(4)] == [None] * 4
    assert method.allocated == [(2, 15), (2, 65)]


def test_caches_grow_for_more_new_tokens_too(folder, make_engine, make_prompts) -> None:
    """A method that evicts prompt tokens allocates for the new tokens on top of its budget."""
    options = {"budget": 4.0, "dense_layers": 0}
    prompts = make_prompts(30, 10)
    requests = [Request(0, prompts[0], 3, ()), Request(1, prompts[1], 20, ())]
    alone = [_run(make_engine(folder, 1, SnapKV(**options)), each)[each.key] for each in requests]
    for slots in (1, 2):
        found = _run(make_engine(folder, slots, SnapKV(**options)), *requests)
        assert all(_same(found[each.request.key], each) and each.error is None for each in alone)


def test_requests_are_taken_one_at_a_time_as_slots_get_free(folder, make_engine, make_prompts) -> None:
    """An endless iterator must not be consumed."""
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield Request(taken, make_prompts(5)[0], 3, ())

    done = make_engine(folder, 2).generate(endless())
    assert [next(done).key for _ in range(4)] == [1, 2, 3, 4]
    assert taken <= 4 + 2 + 1


def test_the_stats_add_up_and_the_callback_counts_tokens(folder, make_engine, make_prompts) -> None:
    for slots in (1, 3):
        engine, counts = make_engine(folder, slots), []
        engine.reserve(80)
        requests = [Request(key, prompt, 6 + key, ()) for key, prompt in enumerate(make_prompts(30, 5, 60, 8))]
        done = list(engine.generate(requests, counts.append))
        stats = engine.stats
        assert stats.prefill_tokens == 30 + 5 + 60 + 8
        assert sum(counts) == sum(len(completion.token_ids) for completion in done) == 6 + 7 + 8 + 9
        assert stats.decode_tokens == sum(counts) - len(requests)
        assert stats.prefill_s == pytest.approx(sum(completion.prefill_s for completion in done))
        assert stats.decode_s > 0
        if slots == 1:
            assert stats.decode_s <= sum(completion.decode_s for completion in done)
        assert stats.peak_gpu_bytes is None
