"""Prompts on a GPU: launched without waiting, in bounded memory, by the attention plan that was made for them."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecache.cache.base import CacheMethod, LayerCache
from sparsecache.cache.streams import PromptStream
from sparsecache.engine.base import Request
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.generator import Generator
from sparsecache.kernels import attention
from sparsecache.methods import load_method, make_method, method_names, method_options, parse_options
from sparsecache.methods.h2o import H2O
from sparsecache.methods.infinigen import InfiniGen
from sparsecache.testing.method_under_test import MethodUnderTest

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine")
GPU = torch.device("cuda")
WITH_OFFLOAD = [name for name in method_names() if "offload" in method_options(load_method(name))]


CASES = [*((name, False) for name in method_names()), *((name, True) for name in WITH_OFFLOAD)]


def _tight(name: str, offload: bool = False) -> CacheMethod:
    """Return a method with options that drop tokens."""
    options = {**MethodUnderTest.of(name).tight, **({"offload": True} if offload else {})}
    return make_method(name, {**parse_options(name, {}), **options})


@pytest.mark.parametrize(("name", "offload"), CASES)
def test_a_prompt_is_launched_without_waiting_for_the_device(
    name: str, offload: bool, make_checkpoint: Any, make_decoder: Callable[..., Decoder]
) -> None:
    """The host prepares the next prompt meanwhile. Options drop tokens."""
    folder = make_checkpoint("llama", num_hidden_layers=3)
    decoder = make_decoder(folder, _tight(name, offload), torch.bfloat16, GPU)
    decoder.allocate(2, 400, 100)
    assert decoder.cache is not None
    prompt = torch.randint(3, 1024, (300,), device=GPU)
    with torch.inference_mode():
        first = decoder.prefill(prompt, 0)  # compiles
        decoder.cache.free_slot(0)
        torch.cuda.synchronize()
        torch.cuda._sleep(10**9)
        awake = torch.cuda.current_stream().record_event()
        second = decoder.prefill(prompt, 0)
        assert not awake.query()
    assert torch.equal(first, second)


def test_offloading_a_prompt_takes_no_more_memory_with_more_layers(
    make_checkpoint: Any, make_decoder: Callable[..., Decoder]
) -> None:
    """However far the host is ahead of the device."""
    prompt, peaks = torch.ones(4000, device=GPU, dtype=torch.int64), []
    for layers in (4, 24):
        folder = make_checkpoint("llama", num_hidden_layers=layers)
        decoder = make_decoder(folder, InfiniGen(skew=False, offload=True), torch.bfloat16, GPU)
        decoder.allocate(1, len(prompt) + 1, 1)
        with torch.inference_mode():
            decoder.prefill(prompt, 0)  # compiles
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_stats()["active_bytes.all.current"]  # with what another stream still reads
            torch.cuda._sleep(10**9)
            decoder.prefill(prompt, 0)
            torch.cuda.synchronize()
        peaks.append(torch.cuda.memory_stats()["active_bytes.all.peak"] - before)
    shape = decoder.shape
    assert peaks[1] < peaks[0] + 3 * (2 * shape.kv_heads * len(prompt) * shape.head_dim * 2)  # rows of three layers


@contextmanager
def _store_on_the_current_stream(stream: PromptStream, *tensors: Tensor) -> Iterator[None]:
    yield


@contextmanager
def _store_late(stream: PromptStream, *tensors: Tensor) -> Iterator[None]:
    with _storing(stream, *tensors):
        torch.cuda._sleep(5_000_000)  # some milliseconds: longer than the rest of a tiny model's layer
        yield


_storing = PromptStream.storing
_NOT_STATE = ("config", "method", "_method", "stats", "seq_lens", "_streams")


def _state(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a cache with their names."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, list | tuple):
        for at, each in enumerate(value):
            yield from _state(each, f"{path}[{at}]")
    elif isinstance(value, LayerCache) or type(value).__module__.startswith("sparsecache."):
        for name, each in getattr(value, "__dict__", {}).items():
            if name not in _NOT_STATE:
                yield from _state(each, f"{path}.{name}")


@pytest.mark.parametrize(("name", "offload"), CASES)
@torch.inference_mode()
def test_a_prompt_stored_beside_the_model_is_that_of_one_stream(
    name: str,
    offload: bool,
    make_checkpoint: Any,
    make_decoder: Callable[..., Decoder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if the side stream is late. The first step afterwards gives the same logits."""
    folder = make_checkpoint("llama", num_hidden_layers=4)
    decoder = make_decoder(folder, _tight(name, offload), torch.bfloat16, GPU)
    prompt, found = torch.randint(3, 1024, (600,), device=GPU), []
    for storing in (_store_on_the_current_stream, _storing, _store_late):
        monkeypatch.setattr(PromptStream, "storing", storing)
        decoder.allocate(2, 700, 100)
        assert decoder.cache is not None
        tensors = {"logits of the prompt": decoder.prefill(prompt, 1)}
        torch.cuda.synchronize()  # with copies to host memory
        tensors |= {at: tensor.clone() for at, tensor in _state(decoder.cache.layers)}
        tensors["logits of a step"] = decoder.step(*torch.tensor([[3], [600], [1]], device=GPU))
        found.append(tensors)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for at, tensor in other.items():
            torch.testing.assert_close(tensor, found[0][at], msg=lambda text, at=at: f"{at}: {text}")


@pytest.mark.parametrize("name", ["quest", "h2o", "snapkv", "rkv", "shadowkv", "lrqk"])
@torch.inference_mode()
def test_a_prompt_stored_beside_the_model_takes_one_layer_more_of_memory(
    name: str, make_checkpoint: Any, make_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far the host is ahead of the device."""
    prompt, peaks = torch.ones(8192, device=GPU, dtype=torch.int64), []
    folder = make_checkpoint("llama", num_hidden_layers=24)
    decoder = make_decoder(folder, _tight(name), torch.bfloat16, GPU)
    for storing in (_store_on_the_current_stream, _storing):
        monkeypatch.setattr(PromptStream, "storing", storing)
        decoder.allocate(1, len(prompt) + 1, 1)
        decoder.prefill(prompt, 0)  # compiles
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["active_bytes.all.current"]
        torch.cuda._sleep(10**9)
        decoder.prefill(prompt, 0)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.memory_stats()["active_bytes.all.peak"] - before)
    shape = decoder.shape
    one_layer = (shape.heads + 2 * shape.kv_heads) * len(prompt) * shape.head_dim * 2
    assert peaks[1] <= peaks[0] + one_layer + 4 * 2**20  # the allocator's blocks may be larger than their tensors


def test_requests_after_a_prompt_out_of_memory_are_decoded(
    make_checkpoint: Any, make_engine: Callable[..., Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(make_checkpoint("llama", num_hidden_layers=4), 1, _tight("quest"), torch.bfloat16, GPU)
    requests = [Request(at, list(range(3, 300 + at)), 8, ()) for at in range(2)]
    expected = [done.token_ids for done in engine.generate(requests)]
    with monkeypatch.context() as patch:
        original, layers = Decoder._mlp_hidden, []

        def fail_in_the_second_layer(decoder: Decoder, *inputs: Any) -> Any:
            layers.append(None)
            if len(layers) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return original(decoder, *inputs)

        patch.setattr(Decoder, "_mlp_hidden", fail_in_the_second_layer)
        assert [bool(done.error) for done in engine.generate(requests)] == [True, False]
    assert [done.token_ids for done in engine.generate(requests)] == expected


@pytest.fixture
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return every call of torch's attention: what cuDNN keys its plans by, and whether cuDNN may be used."""
    calls: list[dict[str, Any]] = []
    original = attention.scaled_dot_product_attention

    def attend(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        key = [(x.shape, x.stride(), x.dtype, x.device) for x in tensors], options.get("enable_gqa")
        causal, cudnn = bool(options.get("is_causal")), torch.backends.cuda.cudnn_sdp_enabled()
        calls.append({"key": key, "causal": causal, "cudnn": cudnn})
        return original(*tensors, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", attend)
    return calls


def test_cudnn_is_used_for_prompts_alone(
    make_checkpoint: Any, make_engine: Callable[..., Generator], attention_calls: list[dict[str, Any]]
) -> None:
    """The last layer attends with the last token alone, over keys of a new length for every prompt."""
    engine = make_engine(make_checkpoint(), 2, None, torch.bfloat16, GPU)
    requests = [Request(length, list(range(3, 3 + length)), 8, ()) for length in (5, 95, 300)]
    assert all(done.error is None for done in engine.generate(requests))
    assert {(call["causal"], call["cudnn"]) for call in attention_calls} == {(True, True), (False, False)}


@pytest.mark.parametrize("tokens", [1, 511, 600, 1024])
def test_a_prompt_uses_the_plan_that_was_made_for_it(
    tokens: int,
    make_checkpoint: Any,
    make_decoder: Callable[..., Decoder],
    attention_calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_planned", set())
    decoder = make_decoder(make_checkpoint(), None, torch.bfloat16, GPU)
    decoder.allocate(1, tokens + 1, 1)
    with torch.inference_mode():
        decoder.warm_attention_plan(tokens)
        decoder.prefill(torch.ones(tokens, device=GPU, dtype=torch.int64), 0)
        planned, *others = [call["key"] for call in attention_calls if call["causal"]]
        assert others and all(key == planned for key in others)
        before = len(attention_calls)
        decoder.warm_attention_plan(tokens)
        assert len(attention_calls) == before


def test_a_method_that_uses_the_logsumexp_uses_the_plans_made_for_it(
    make_checkpoint: Any, make_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_planned", set())
    folder = make_checkpoint("llama", num_hidden_layers=4)
    decoder = make_decoder(folder, H2O(budget=50, dense_layers=1), torch.bfloat16, GPU)
    decoder.allocate(1, 601, 1)
    assert decoder.cache is not None
    with torch.inference_mode():
        decoder.warm_attention_plan(600)
        plans = set(attention._planned)
        decoder.prefill(torch.randint(3, 1024, (600,), device=GPU), 0)
    assert {plan[-1] for plan in plans} == {False, True}
    assert attention._planned == plans
    assert all(cache.num_tokens[0].tolist() == [50] * decoder.shape.kv_heads for cache in decoder.cache.layers[1:])


def test_no_matrix_of_all_scores_of_a_prompt_is_built(
    make_checkpoint: Any, make_engine: Callable[..., Generator]
) -> None:
    engine = make_engine(make_checkpoint(), 1, None, torch.bfloat16, GPU)
    length = 30_000
    engine.reserve(length + 1)
    engine.reset_stats()
    before = torch.cuda.memory_allocated()
    (done,) = engine.generate([Request(0, torch.randint(3, 1024, (length,)).tolist(), 1, ())])
    assert done.error is None and engine.stats.peak_gpu_bytes is not None
    assert engine.stats.peak_gpu_bytes - before < length**2 / 2  # one head's scores take four times as much
    assert engine.stats.peak_gpu_bytes - before < 2 * engine._decoder.prompt_nbytes(length)
