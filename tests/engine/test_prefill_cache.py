"""Decoders that share prompts, against the decoder that reads every prompt itself."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsecache.cache.base import CacheMethod
from sparsecache.engine.base import Completion, Request
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.families import load_family
from sparsecache.engine.generator import Generator
from sparsecache.engine.loading import Checkpoint
from sparsecache.engine.prefill_cache import PrefillCache, PrefillCachingDecoder
from sparsecache.engine.rope import Rope
from sparsecache.methods.h2o import H2O
from sparsecache.methods.snapkv import SnapKV
from sparsecache.methods.vanilla import Vanilla
from sparsecache.testing.method_under_test import MethodUnderTest

CPU, GPU = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine")


def load(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """What a decoder needs but a method."""
    checkpoint = Checkpoint(folder)
    architecture = load_family(checkpoint.model_type).architecture(checkpoint.config)
    return architecture, checkpoint.load(architecture, device, dtype), Rope(checkpoint.config, device)


@pytest.fixture(scope="module")
def model(make_checkpoint) -> tuple[Any, ...]:
    """What a decoder on the CPU needs but a method."""
    return load(make_checkpoint(), CPU, torch.float32)


@pytest.fixture
def count_prompts(monkeypatch) -> list[int]:
    """The lengths of the prompts whose forward pass was computed."""
    lengths: list[int] = []
    original = Decoder._forward_prompt

    def prompt(decoder: Decoder, token_ids: torch.Tensor, *others: Any) -> torch.Tensor:
        lengths.append(len(token_ids))
        return original(decoder, token_ids, *others)

    monkeypatch.setattr(Decoder, "_forward_prompt", prompt)
    return lengths


def decode(decoder: Decoder, prompts: list[list[int]]) -> list[Completion]:
    requests = [Request(at, prompt, 6, ()) for at, prompt in enumerate(prompts)]
    return sorted(Generator(decoder, 2).generate(requests), key=lambda done: int(done.key))


@pytest.mark.parametrize("most", [3, 2, 0])
def test_texts_are_those_of_prompts_that_are_read_each_time(most, model, make_prompts, count_prompts) -> None:
    """most: the prompts for which there is room, the first ones."""
    prompts = make_prompts(30, 21, 9, seed=3)
    methods: list[CacheMethod] = [Vanilla(), H2O(budget=8, dense_layers=0)]
    expected = [decode(Decoder(*model, method), prompts) for method in methods]
    shared = PrefillCache()
    reader = PrefillCachingDecoder(*model, Vanilla(), shared)
    shared.limit_nbytes = sum(reader.qkv_nbytes(len(prompt)) for prompt in prompts[:most])
    count_prompts.clear()
    for prompt in prompts:
        reader.cache_prompt(torch.tensor(prompt))
    assert count_prompts == [30, 21, 9][:most] and len(shared) == most
    assert 0 <= shared.nbytes <= shared.limit_nbytes
    for method, known in zip(methods, expected, strict=True):
        found = decode(PrefillCachingDecoder(*model, method, shared), prompts)
        assert [done.token_ids for done in found] == [done.token_ids for done in known]
        assert [done.report for done in found] == [done.report for done in known]
        assert [done.shared_prefill_s > 0 for done in found] == [True] * most + [False] * (3 - most)
        assert all(done.prefill_s > done.shared_prefill_s for done in found)
    assert len(count_prompts) == most + 2 * (3 - most)
    assert expected[0] != expected[1]


def test_the_time_of_a_shared_prompt_counts_for_every_method(model, make_prompts) -> None:
    (prompt,) = make_prompts(40, seed=4)
    shared = PrefillCache()
    first, later = (Generator(PrefillCachingDecoder(*model, Vanilla(), shared), 1) for _ in range(2))
    (own,) = first.generate([Request(0, prompt, 3, ())])
    (done,) = later.generate([Request(0, prompt, 3, ())])
    assert own.shared_prefill_s == 0 < done.shared_prefill_s < own.prefill_s
    assert later.stats.prefill_s == done.prefill_s > done.shared_prefill_s


def test_a_cleared_cache_holds_nothing(model, make_prompts, count_prompts) -> None:
    (prompt,) = make_prompts(12, seed=5)
    shared = PrefillCache()
    reader = PrefillCachingDecoder(*model, Vanilla(), shared)
    for _ in range(2):
        reader.cache_prompt(torch.tensor(prompt))
    assert len(count_prompts) == 1 and shared.nbytes > 0
    shared.clear()
    assert (len(shared), shared.nbytes) == (0, 0) and shared.get(torch.tensor(prompt)) is None
    reader.cache_prompt(torch.tensor(prompt))
    assert len(count_prompts) == 2


def test_a_cache_of_few_queries_takes_less_memory_and_refuses_methods_that_read_more(model, make_prompts) -> None:
    (prompt,) = make_prompts(40, seed=7)
    bounds, taken = [], []
    for queries in (0, 3, 40, None):
        prompts = PrefillCache(queries=queries)
        reader = PrefillCachingDecoder(*model, Vanilla(), prompts)
        reader.cache_prompt(torch.tensor(prompt))
        bounds.append(reader.qkv_nbytes(40))
        taken.append(prompts.nbytes)
    assert taken == bounds and taken[0] < taken[1] < taken[2] == taken[3]
    shape, value = reader.shape, torch.float32.itemsize
    assert taken[1] - taken[0] == 3 * shape.layers * shape.heads * shape.head_dim * value
    assert taken[3] - taken[0] == 40 * shape.layers * shape.heads * shape.head_dim * value
    for method, count in ((H2O(), "all"), (SnapKV(window=4), "4")):
        with pytest.raises(ValueError, match=f"reads {count} queries of a prompt, but only 3 are kept"):
            PrefillCachingDecoder(*model, method, PrefillCache(queries=3))
    PrefillCachingDecoder(*model, SnapKV(window=3), PrefillCache(queries=3))


@needs_gpu
@pytest.mark.parametrize("name", ["vanilla", "snapkv", "rkv", "tova", "freekv", "h2o", "infinigen", "quest", "oracle"])
def test_on_a_gpu_texts_are_those_of_prompts_that_are_read_each_time(name, make_checkpoint, make_prompts) -> None:
    """With CUDA graphs, in half precision, whose prompts are padded, and with no more queries than the method reads."""
    parts, prompts = load(make_checkpoint(), GPU, torch.bfloat16), make_prompts(700, 300, 30, seed=6)
    tight = MethodUnderTest.of(name)
    shared = PrefillCache(queries=tight.make(tight.tight).prompt_queries)
    reader = PrefillCachingDecoder(*parts, Vanilla(), shared)
    for prompt, following in zip(prompts, [300, 30, None], strict=True):
        before = shared.nbytes
        reader.cache_prompt(torch.tensor(prompt, device=GPU), following)
        assert 0 < shared.nbytes - before <= reader.qkv_nbytes(len(prompt))
    found = []
    for make in (lambda method: Decoder(*parts, method), lambda method: PrefillCachingDecoder(*parts, method, shared)):
        done = decode(make(tight.make(tight.tight)), prompts)
        assert [each.error for each in done] == [None] * 3
        found.append([(each.token_ids, each.report) for each in done])
    assert found[0] == found[1]
