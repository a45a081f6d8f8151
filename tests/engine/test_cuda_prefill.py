"""Prompts on a GPU: launched without waiting, in bounded memory, by the attention plan that was made for them."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsecache.engine.base import Request
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.generator import Generator
from sparsecache.kernels import attention
from sparsecache.methods import load_method, make_method, method_names, method_options, parse_options
from sparsecache.methods.h2o import H2O
from sparsecache.methods.infinigen import InfiniGen
from sparsecache.testing.contract import MethodUnderTest

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine")
GPU = torch.device("cuda")
WITH_OFFLOAD = [name for name in method_names() if "offload" in method_options(load_method(name))]


@pytest.mark.parametrize(
    ("name", "offload"), [*((name, False) for name in method_names()), *((name, True) for name in WITH_OFFLOAD)]
)
def test_a_prompt_is_launched_without_waiting_for_the_device(
    name: str, offload: bool, make_checkpoint: Any, make_decoder: Callable[..., Decoder]
) -> None:
    """The host prepares the next prompt meanwhile. Options drop tokens."""
    options = {**MethodUnderTest.of(name).tight, **({"offload": True} if offload else {})}
    method = make_method(name, {**parse_options(name, {}), **options})
    decoder = make_decoder(make_checkpoint("llama", num_hidden_layers=3), method, torch.bfloat16, GPU)
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
