"""An engine over tiny checkpoints with random weights, for any method."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsecache.cache.base import Method
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.families import load_family
from sparsecache.engine.loading import Checkpoint
from sparsecache.engine.rope import Rope
from sparsecache.testing.random_checkpoint import make_random_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of the family, made once."""
    base = tmp_path_factory.mktemp("families")

    def make(model_type: str) -> Path:
        return make_random_checkpoint(
            base / model_type, model_type=model_type, initializer_range=0.25, num_hidden_layers=3
        )

    return make


@pytest.fixture(scope="session")
def decoder(checkpoint: Callable[[str], Path]) -> Callable[[str, Method], Decoder]:
    """Our decoder of a family over a method."""

    def make(model_type: str, method: Method) -> Decoder:
        found = Checkpoint(checkpoint(model_type))
        architecture = load_family(model_type).architecture(found.config)
        weights = found.load(architecture, CPU, torch.float32)
        made = Decoder(architecture, weights, Rope(found.config, CPU), method)
        method.check(made.shape)
        text = method.calibration_text()
        if text is not None:
            with torch.inference_mode():
                made.calibrate(torch.tensor(found.tokenizer(text)["input_ids"][:300]), lambda layers: None)
        return made

    return make


@pytest.fixture(scope="session")
def transformers_model(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    """transformers' model of a family, without stop ids."""

    def load(model_type: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(checkpoint(model_type), dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        return model

    return load
