"""The generator: stop rules, slots, room, failures, and its clock."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from sparsecache.engine.base import Completion, Request
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.generator import Generator
from sparsecache.methods.vanilla import Vanilla

STOPS = (5, 1)


@pytest.fixture(scope="module")
def folder(make_checkpoint):
    return make_checkpoint()


@pytest.fixture(scope="module")
def free_text(folder, make_engine, our_texts, make_prompts) -> Callable[[int], tuple[list[int], list[int]]]:
    """A prompt of some length, and the 40 tokens that follow it when nothing stops them."""

    def text(length: int) -> tuple[list[int], list[int]]:
        (prompt,) = make_prompts(length, seed=length)
        return prompt, our_texts(make_engine(folder), [prompt], 40)[0]

    return text


def _run(engine: Generator, *requests: Request) -> dict[int, Completion]:
    return {completion.key: completion for completion in engine.generate(requests)}


def _same(first: Completion, second: Completion) -> bool:
    return replace(first, prefill_s=0, decode_s=0) == replace(second, prefill_s=0, decode_s=0)


@pytest.mark.parametrize("slots", [1, 3])
def test_the_prompt_after_one_is_made_ready_for_while_that_is_read(
    slots, folder, make_engine, make_prompts, monkeypatch
) -> None:
    seen: list[tuple[str, int]] = []
    whole = Decoder.prefill

    def prefill(decoder, token_ids, *others):
        seen.append(("prompt", len(token_ids)))
        return whole(decoder, token_ids, *others)

    monkeypatch.setattr(Decoder, "prefill", prefill)
    monkeypatch.setattr(Decoder, "expect", lambda decoder, tokens: seen.append(("expect", tokens)))
    lengths = (9, 30, 4, 17)
    requests = [Request(at, prompt, 5, ()) for at, prompt in enumerate(make_prompts(*lengths))]
    assert len(_run(make_engine(folder, slots), *requests)) == len(lengths)
    wanted = [each for first, then in pairwise(lengths) for each in (("prompt", first), ("expect", then))]
    assert seen == [*wanted, ("prompt", lengths[-1])]


def test_what_cannot_be_made_ready_fails_no_other_prompt(folder, make_engine, make_prompts, monkeypatch) -> None:
    def expect(decoder, tokens):
        raise RuntimeError("no memory left for a plan")

    monkeypatch.setattr(Decoder, "expect", expect)
    done = _run(make_engine(folder), *(Request(at, prompt, 5, ()) for at, prompt in enumerate(make_prompts(9, 30))))
    assert [completion.error for completion in done.values()] == [None, None]


def test_ends_with_the_first_stop_id_which_is_kept(folder, make_engine, free_text) -> None:
    prompt, text = free_text(20)
    at = next(at for at in range(5, 40) if text[at] not in text[:at])
    done = _run(make_engine(folder), Request(0, prompt, 40, (2000, text[at])))[0]
    assert done.token_ids == text[: at + 1]
    assert (done.finish_reason, done.error) == ("stop", None)


def test_ends_at_the_cap_without_a_stop_id(folder, make_engine, free_text) -> None:
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
    for slots in (1, 3):
        for reserve in (0, 400):
            for order in (requests, requests[::-1]):
                engine = make_engine(folder, slots)
                if reserve:
                    engine.reserve(reserve)
                found = _run(engine, *order)
                assert found.keys() == alone.keys()
                assert all(_same(found[key], alone[key]) for key in alone)


class _Watched(Vanilla):
    """Notes the rooms made, the slots filled and released, and who is in flight together."""

    def __init__(self) -> None:
        self.rooms: list[tuple[int, int]] = []
        self.filled: list[int] = []
        self.released: list[int] = []
        self.together: list[list[int]] = []

    def allocate(self, shape, slots, max_tokens, device, dtype) -> None:
        assert set(self.filled) <= set(self.released), "room was made anew under a sequence in flight"
        self.rooms.append((slots, max_tokens))
        super().allocate(shape, slots, max_tokens, device, dtype)

    def prefill(self, layer, slot, q, k, v, max_new_tokens) -> None:
        if layer == 0:
            self.filled.append(slot)
        super().prefill(layer, slot, q, k, v, max_new_tokens)

    def attend(self, layer, q, k, v, slots):
        if layer == 0:
            self.together.append(slots.tolist())
        return super().attend(layer, q, k, v, slots)

    def release(self, slot: int) -> None:
        self.released.append(slot)
        super().release(slot)

    def report(self, slot: int) -> dict[str, int]:
        return {"slot": slot, "kept": int(self._cache.lengths[0, slot])}


def test_slots_are_shared_reused_and_released(folder, make_engine, make_prompts) -> None:
    method = _Watched()
    engine = make_engine(folder, 2, method)
    engine.reserve(40)
    requests = [Request(key, prompt, 4 + key, ()) for key, prompt in enumerate(make_prompts(9, 8, 7, 6, 5))]
    done = _run(engine, *requests)
    assert method.rooms == [(2, 40)]
    assert sorted(method.filled) == sorted(method.released) and set(method.filled) == {0, 1}
    assert [0, 1] in [sorted(slots) for slots in method.together]
    assert all(len(set(slots)) == len(slots) for slots in method.together)
    for request in requests:  # every token but the newest was kept
        assert done[request.key].report["kept"] == len(request.token_ids) + request.max_new_tokens - 1


def test_room_grows_for_a_longer_request_when_nothing_is_in_flight(folder, make_engine, make_prompts) -> None:
    method = _Watched()
    requests = [Request(key, prompt, 5, ()) for key, prompt in enumerate(make_prompts(10, 10, 60, 20))]
    done = _run(make_engine(folder, 2, method), *requests)
    assert [done[key].error for key in range(4)] == [None] * 4
    assert method.rooms == [(2, 15), (2, 65)]


def test_requests_are_taken_one_at_a_time_as_slots_get_free(folder, make_engine, make_prompts) -> None:
    """An endless iterator must not be drained."""
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield Request(taken, make_prompts(5)[0], 3, ())

    done = make_engine(folder, 2).generate(endless())
    assert [next(done).key for _ in range(4)] == [1, 2, 3, 4]
    assert taken <= 4 + 2 + 1


def test_the_clock_adds_up_and_ticks_count_tokens(folder, make_engine, make_prompts) -> None:
    for slots in (1, 3):
        engine, ticks = make_engine(folder, slots), []
        engine.reserve(80)
        requests = [Request(key, prompt, 6 + key, ()) for key, prompt in enumerate(make_prompts(30, 5, 60, 8))]
        done = list(engine.generate(requests, ticks.append))
        clock = engine.clock
        assert clock.prefill_tokens == 30 + 5 + 60 + 8
        assert sum(ticks) == sum(len(completion.token_ids) for completion in done) == 6 + 7 + 8 + 9
        assert clock.decode_tokens == sum(ticks) - len(requests)
        assert clock.prefill_s == pytest.approx(sum(completion.prefill_s for completion in done))
        assert clock.decode_s > 0
        if slots == 1:
            assert clock.decode_s <= sum(completion.decode_s for completion in done)
        assert clock.peak_gpu_bytes is None


class _Faulty(Vanilla):
    """Raises in one call, for the sequences whose prompt has 13 tokens."""

    def __init__(self, where: str, error: Exception):
        self._where, self._error = where, error
        self._bad: set[int] = set()

    def _maybe(self, where: str, slot: int, layer: int = 1) -> None:
        if where == self._where and slot in self._bad and layer == 1:
            raise self._error

    def allocate(self, shape, slots, max_tokens, device, dtype) -> None:
        if self._where == "allocate" and max_tokens == 13 + 10:
            raise self._error
        super().allocate(shape, slots, max_tokens, device, dtype)

    def prefill(self, layer, slot, q, k, v, max_new_tokens) -> None:
        if k.shape[1] == 13:
            self._bad.add(slot)
        self._maybe("prefill", slot, layer)
        super().prefill(layer, slot, q, k, v, max_new_tokens)

    def attend(self, layer, q, k, v, slots):
        out = super().attend(layer, q, k, v, slots)
        for slot in slots.tolist():
            self._maybe("attend", slot, layer)
        return out

    def report(self, slot):
        self._maybe("report", slot)
        return {}

    def release(self, slot: int) -> None:
        self._bad.discard(slot)
        super().release(slot)


ERRORS = [ValueError("too odd\nsecond line"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")]


@pytest.mark.parametrize("error", ERRORS, ids=["ValueError", "OutOfMemoryError"])
@pytest.mark.parametrize("where", ["prefill", "attend", "report", "allocate"])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_failing_request_becomes_an_error_and_leaves_the_others_alone(
    where, error, slots, folder, make_engine, make_prompts, capfd
) -> None:
    lengths = (9, 6, 4, 13, 8, 12, 13, 7)
    requests = [Request(key, prompt, 10, ()) for key, prompt in enumerate(make_prompts(*lengths))]
    alone = {request.key: _run(make_engine(folder), request)[request.key] for request in requests}
    engine = make_engine(folder, slots, _Faulty(where, error))
    if where != "allocate":
        engine.reserve(30)
    found = _run(engine, *requests)
    assert found.keys() == alone.keys()
    failed = {key for key, completion in found.items() if completion.error}
    bad = {key for key, length in enumerate(lengths) if length == 13}
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

    engine._method._where = "nowhere"  # what failed leaves nothing behind
    again = _run(engine, *requests)
    assert all(_same(again[key], alone[key]) for key in alone)
    assert json.dumps([completion.report for completion in again.values()])


def test_tokens_of_failed_requests_are_not_counted(folder, make_engine, make_prompts) -> None:
    engine, ticks = make_engine(folder, 1, _Faulty("prefill", ERRORS[0])), []
    requests = [Request(key, prompt, 3, ()) for key, prompt in enumerate(make_prompts(13, 5))]
    done = list(engine.generate(requests, ticks.append))
    assert done[0].error and not done[1].error
    assert sum(ticks) == 3
    assert engine.clock.prefill_tokens == 5


def test_a_room_that_does_not_fit_is_tried_again_request_by_request(folder, make_engine, make_prompts) -> None:
    engine = make_engine(folder, 1, _Faulty("allocate", ERRORS[1]))
    engine.reserve(13 + 10)
    (done,) = engine.generate([Request(0, make_prompts(5)[0], 10, ())])
    assert done.error is None


def test_an_empty_or_foreign_prompt_is_an_error_row(folder, make_engine, make_prompts) -> None:
    good = make_prompts(5)[0]
    requests = [Request(0, [], 5, ()), Request(1, [3, 999999], 5, ()), Request(2, good, 5, ())]
    done = _run(make_engine(folder), *requests)
    assert done[0].error and done[1].error and not done[2].error


def test_an_interrupt_is_not_swallowed(folder, make_engine, make_prompts) -> None:
    engine = make_engine(folder, 1, _Faulty("attend", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        list(engine.generate([Request(0, make_prompts(13)[0], 5, ())]))
