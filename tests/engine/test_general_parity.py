"""The two engines check each other: the same method gives the same text and the same counts in both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsecache.cache.base import CacheMethod
from sparsecache.engine.base import Request
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.families import family_names, load_family
from sparsecache.engine.generator import Generator
from sparsecache.engine.loading import Checkpoint
from sparsecache.engine.reference import TransformersEngine
from sparsecache.engine.rope import Rope
from sparsecache.methods import method_names
from sparsecache.testing.families import CALIBRATION, make_engine
from sparsecache.testing.method_under_test import MethodUnderTest
from tests.engine.general import CPU, completions

WINDOW = 96


@pytest.fixture(scope="module")
def models(make_checkpoint: Callable[..., Path]) -> Callable[[str], tuple[Path, Any]]:
    """Return a checkpoint of a family and transformers' model of it, loaded once."""
    loaded: dict[str, tuple[Path, Any]] = {}

    def load(model_type: str) -> tuple[Path, Any]:
        if model_type not in loaded:
            folder = make_checkpoint(model_type, num_hidden_layers=3, head_dim=16)
            loaded[model_type] = folder, TransformersEngine.load(folder, CPU, torch.float32).model
        return loaded[model_type]

    return load


@pytest.fixture(scope="module")
def our_decoder() -> Callable[[Path, CacheMethod], Generator]:
    """Return our engine over a checkpoint, calibrated with the same tokens."""

    def load(folder: Path, method: CacheMethod) -> Generator:
        checkpoint = Checkpoint(folder)
        architecture = load_family(checkpoint.model_type).architecture(checkpoint.config)
        weights = checkpoint.load(architecture, CPU, torch.float32)
        decoder = Decoder(architecture, weights, Rope(checkpoint.config, CPU), method)
        if method.calibration_text() is not None:
            with torch.inference_mode():
                decoder.calibrate(CALIBRATION, lambda layers: None)
        return Generator(decoder, 1)

    return load


@pytest.mark.parametrize(
    ("method", "model_type"),
    [(method, model_type) for method in method_names() for model_type in ("llama", "qwen3")]
    + [(method, model_type) for method in ("vanilla", "infinigen", "snapkv") for model_type in ("mistral", "qwen2")],
)
def test_every_method_gives_the_text_and_the_report_of_our_decoder(
    method, model_type, models, our_decoder, make_prompts
) -> None:
    """Families differ in how q, k and v are computed, before any cache: two of them are enough for most methods."""
    folder, model = models(model_type)
    requests = [Request(at, prompt, 8, ()) for at, prompt in enumerate(make_prompts(60, 3))]
    subject = MethodUnderTest.of(method)
    for options in subject.tested if model_type == "llama" else subject.tested[-1:]:  # the last ones drop more
        expected = completions(our_decoder(folder, subject.make(options)), requests)
        assert completions(make_engine(model, subject.make(options), WINDOW), requests) == expected


@pytest.mark.parametrize("guess", ["input", "residual"])
def test_infinigen_speculates_from_both_sources_as_our_decoder(guess, models, our_decoder, make_prompts) -> None:
    requests = [Request(at, prompt, 16, ()) for at, prompt in enumerate(make_prompts(60, 30))]
    for model_type in family_names():
        folder, model = models(model_type)
        methods = [
            MethodUnderTest.of("infinigen").make({"dense_layers": 1, "budget": 6.0, "guess": guess}) for _ in range(2)
        ]
        expected = completions(our_decoder(folder, methods[0]), requests)
        assert completions(make_engine(model, methods[1], WINDOW), requests) == expected
        assert expected[0][2]["kept"] < 0.5
