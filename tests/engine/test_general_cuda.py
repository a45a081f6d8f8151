"""The general engine on GPUs: the text of transformers, alone and in batches, and a model split over two GPUs."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsecache.engine.base import Request
from sparsecache.engine.general.loading import load_model
from sparsecache.engine.reference import TransformersEngine
from sparsecache.methods import method_names
from sparsecache.testing.families import FAMILIES, WINDOW, Family, make_engine
from sparsecache.testing.method_under_test import MethodUnderTest
from tests.engine.general import completions, guess_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine")
GPU = torch.device("cuda")


@cache
def family(model_type: str) -> Family:
    return Family(model_type, GPU)


def _requests() -> list[Request]:
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in (40, 3, 90, 12)]
    return [Request(at, prompt, 16 + at, (7,)) for at, prompt in enumerate(prompts)]


def _texts(engine: Any) -> list[list[int]]:
    return [token_ids for token_ids, _, _ in completions(engine, _requests())]


@pytest.mark.parametrize("method", method_names())
def test_every_method_passes_on_a_gpu(method) -> None:
    for model_type in ("gemma3_text", "phi3"):
        family(model_type).check(method)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("method", ["vanilla", "oracle", "infinigen"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_float32_text_is_that_of_transformers(model_type, method, slots) -> None:
    subject = MethodUnderTest.of(method)
    options = {**(subject.lossless or {}), **guess_of(model_type, method)}
    engine = make_engine(family(model_type).model, subject.make(options), WINDOW, slots)
    assert _texts(engine) == _texts(TransformersEngine(family(model_type).model, GPU))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs")
@pytest.mark.parametrize("method", ["oracle", "infinigen"])
@pytest.mark.parametrize("model_type", ["gemma3_text", "phi3"])
def test_a_model_over_two_gpus_gives_the_text_of_one(model_type, method, tmp_path: Path) -> None:
    subject, alone = MethodUnderTest.of(method), family(model_type).model
    alone.save_pretrained(tmp_path)
    split = load_model(tmp_path, [torch.device("cuda", index) for index in range(2)], torch.float32)
    expected = _texts(make_engine(alone, subject.make(subject.tight), WINDOW))
    for slots in (1, 3):
        engine = make_engine(split, subject.make(subject.tight), WINDOW, slots)
        assert len(engine.model.devices) == 2
        assert _texts(engine) == expected
