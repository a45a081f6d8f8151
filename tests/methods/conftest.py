"""Decoders over tiny checkpoints with random weights, for any method."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsecache.cache.base import CacheMethod
from sparsecache.engine.decoder import Decoder
from sparsecache.testing.method_checks import make_decoder
from sparsecache.testing.random_checkpoint import make_random_checkpoint
from tests.methods.presses import kvpress  # noqa: F401 (a fixture)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a checkpoint of a family, made once."""
    base = tmp_path_factory.mktemp("families")

    def make(model_type: str) -> Path:
        return make_random_checkpoint(
            base / model_type, model_type=model_type, initializer_range=0.25, num_hidden_layers=3
        )

    return make


@pytest.fixture(scope="session")
def decoder(checkpoint: Callable[[str], Path]) -> Callable[[str, CacheMethod], Decoder]:
    """Return a decoder of a family over a method, calibrated if the method needs it."""
    return lambda model_type, method: make_decoder(checkpoint(model_type), method)


@pytest.fixture(scope="session")
def transformers_model(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    """Return transformers' model of a family, without stop ids."""

    def load(model_type: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(checkpoint(model_type), dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        return model

    return load
