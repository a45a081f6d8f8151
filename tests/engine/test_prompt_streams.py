"""Storing a prompt beside the model: nothing races, on fake streams, and one layer's tensors are kept."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecache.cache.model_cache import ModelCache
from sparsecache.cache.streams import PromptStream, SideStream
from sparsecache.engine.base import Request, SlotDecoder
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.generator import Generator
from sparsecache.engine.prefill_cache import PrefillCache, PrefillCachingDecoder
from sparsecache.kernels.attention import prompt_attention
from sparsecache.kernels.scores import scaled_scores
from sparsecache.methods import load_method, make_method, method_names, method_options, parse_options
from sparsecache.testing.families import WINDOW, Family, make_engine
from sparsecache.testing.method_under_test import MethodUnderTest
from tests.engine.fake_streams import FakeStreams

WITH_OFFLOAD = [name for name in method_names() if "offload" in method_options(load_method(name))]
CASES = [*((name, False) for name in method_names()), *((name, True) for name in WITH_OFFLOAD)]
PROMPTS = (70, 90)


@pytest.fixture
def make_tight_decoder(make_checkpoint: Any, make_decoder: Callable[..., Decoder]) -> Callable[..., Decoder]:
    """Return a decoder with a method whose options drop tokens."""

    def make(name: str, offload: bool = False) -> Decoder:
        options = {**MethodUnderTest.of(name).tight, **({"offload": True} if offload else {})}
        method = make_method(name, {**parse_options(name, {}), **options})
        return make_decoder(make_checkpoint("llama", num_hidden_layers=4), method)

    return make


def _run(decoder: SlotDecoder) -> list[Tensor]:
    """Prefill two prompts with steps before, between and after; return the logits."""
    decoder.allocate(2, 100, 8)
    found = []
    for slot, length in enumerate(PROMPTS):
        found.append(decoder.prefill(torch.arange(3, 3 + length), slot))
        steps = [(PROMPTS[other] + slot - other, other) for other in range(slot + 1)]
        found += [decoder.step(*torch.tensor([[3], [position], [other]])) for position, other in steps]
    return found


def _run_without_races(decoder: SlotDecoder, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Run on fake streams, free the caches, and assert that nothing raced; return the logits."""
    with FakeStreams(monkeypatch) as fake:
        found = _run(decoder)
        decoder.cache = None
    assert fake.races == []
    return found


@pytest.mark.parametrize(("name", "offload"), CASES)
@torch.inference_mode()
def test_a_prompt_and_the_steps_around_it_do_not_race(
    name: str, offload: bool, make_tight_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_tight_decoder(name, offload)
    expected = _run(decoder)
    found = _run_without_races(decoder, monkeypatch)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def _with_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As prompt_attention_with_logsumexp on a GPU."""
    scores = scaled_scores(q, k, q.shape[2])
    is_later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return prompt_attention(q, k, v), scores.masked_fill_(is_later, -torch.inf).logsumexp(-1)


@torch.inference_mode()
def test_the_logsumexp_of_a_prompt_does_not_race(
    make_tight_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_tight_decoder("h2o")
    expected = _run(decoder)
    monkeypatch.setattr("sparsecache.engine.decoder.prompt_attention_with_logsumexp", _with_logsumexp)
    found = _run_without_races(decoder, monkeypatch)
    torch.testing.assert_close(found, expected)


def _caching(decoder: Decoder) -> PrefillCachingDecoder:
    """Return a decoder of the same model and method that shares prompts."""
    made = object.__new__(PrefillCachingDecoder)
    made.__dict__.update(decoder.__dict__)
    made._prompts = PrefillCache()
    return made


@pytest.mark.parametrize("name", ["quest", "h2o", "shadowkv", "infinigen"])
@torch.inference_mode()
def test_shared_prompts_do_not_race(
    name: str, make_tight_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if they are dropped before the device has read them."""
    decoder = _caching(make_tight_decoder(name))
    with FakeStreams(monkeypatch) as fake:
        first = _run(decoder)  # computes the prompts
        second = _run(decoder)
        decoder._prompts.clear()
        decoder.step(*torch.tensor([[3], [75], [0]]))
        decoder.cache = None
    assert fake.races == []
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["quest", "shadowkv", "infinigen"])
@torch.inference_mode()
def test_the_general_engine_does_not_race(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = MethodUnderTest.of(name)
    model = make_engine(Family("phi3", torch.device("cpu")).model, subject.make(subject.tight), WINDOW)._decoder
    expected = _run(model)
    found = _run_without_races(model, monkeypatch)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def _join_without_waiting(stream: PromptStream) -> None:
    stream._tensors = ()


@contextmanager
def _store_without_keeping(stream: PromptStream, *tensors: Tensor) -> Iterator[None]:
    stream.join()
    with stream._stream.after():
        yield


def _start_without_joining(cache: ModelCache) -> None:
    pass


BROKEN = [
    (PromptStream, "join", _join_without_waiting),
    (PromptStream, "storing", _store_without_keeping),
    (ModelCache, "_join_prompt", _start_without_joining),
    (SideStream, "join", lambda stream: None),
]


@pytest.mark.parametrize(("kind", "name", "broken"), BROKEN)
@torch.inference_mode()
def test_the_fake_streams_find_races(
    kind: type, name: str, broken: Any, make_tight_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_tight_decoder("quest")
    monkeypatch.setattr(kind, name, broken)
    with FakeStreams(monkeypatch) as fake:
        _run(decoder)
    assert fake.races


class _Watch:
    """Watches the q of each layer's prompt; raises an error after one layer.

    alive: how many of them are allocated, per layer, while it is stored.
    """

    def __init__(self, patch: pytest.MonkeyPatch, fail_at: int | None = None, error: BaseException | None = None):
        self.alive: list[int] = []
        self._storages: list[Any] = []
        original = ModelCache.storing_layer

        @contextmanager
        def storing_layer(cache: ModelCache, layer: int, *tensors: Tensor) -> Iterator[None]:
            self._storages.append(weakref.ref(tensors[0].untyped_storage()))
            with original(cache, layer, *tensors):
                yield
                self.alive.append(self.count())
            if layer == fail_at and error is not None:
                raise error

        patch.setattr(ModelCache, "storing_layer", storing_layer)

    def count(self) -> int:
        return sum(storage() is not None for storage in self._storages)


@torch.inference_mode()
def test_one_layers_tensors_are_kept(
    make_tight_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_tight_decoder("quest")
    watch, kept = _Watch(monkeypatch), []
    hidden = Decoder._mlp_hidden
    monkeypatch.setattr(Decoder, "_mlp_hidden", lambda *given: kept.append(watch.count()) or hidden(*given))
    for on_gpu in (False, True):
        with pytest.MonkeyPatch.context() as patch, FakeStreams(patch) if on_gpu else nullcontext():
            decoder.allocate(1, 100, 8)
            decoder.prefill(torch.arange(3, 93), 0)
        assert watch.alive == [1, 1, 1, 1] and kept == [int(on_gpu)] * 4 and watch.count() == 0
        watch.alive.clear()
        kept.clear()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("name", "offload"), [("quest", False), ("shadowkv", False), ("infinigen", False), ("infinigen", True)]
)
@torch.inference_mode()
def test_a_failed_prompt_is_joined_and_keeps_nothing(
    name: str,
    offload: bool,
    error: BaseException,
    make_tight_decoder: Callable[..., Decoder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = make_tight_decoder(name, offload)
    expected = _run(decoder)
    with FakeStreams(monkeypatch) as fake:
        decoder.allocate(2, 100, 8)
        assert decoder.cache is not None
        with pytest.MonkeyPatch.context() as patch:
            watch = _Watch(patch, 2, error)
            with pytest.raises(type(error)):
                decoder.prefill(torch.arange(3, 93), 0)
        error.__traceback__ = None
        assert watch.alive == [1, 1, 1] and watch.count() == 0
        decoder.cache.free_slot(0)
        assert fake.is_joined()
        monkeypatch.setattr(decoder, "allocate", lambda *given: None)
        assert all(torch.equal(one, other) for one, other in zip(_run(decoder), expected, strict=True))
    assert fake.races == []


def test_requests_after_a_failed_prompt_are_decoded(
    make_tight_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_tight_decoder("quest")
    requests = [Request(at, list(range(3, 60 + at)), 6, ()) for at in range(3)]
    expected = [done.token_ids for done in Generator(decoder, 2).generate(requests)]
    engine = Generator(decoder, 2)
    with FakeStreams(monkeypatch) as fake:
        with pytest.MonkeyPatch.context() as patch:
            _Watch(patch, 2, ValueError("odd"))
            assert all(done.error == "ValueError: odd" for done in engine.generate(requests))
        assert [done.token_ids for done in engine.generate(requests)] == expected
    assert fake.races == []
