"""Tiny checkpoints with random weights, our engine over them, and transformers as the reference."""

import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsecache.cache.base import CacheMethod
from sparsecache.engine.base import Completion, Request
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.families import load_family
from sparsecache.engine.generator import Generator
from sparsecache.engine.loading import Checkpoint
from sparsecache.engine.rope import Rope
from sparsecache.methods.vanilla import Vanilla
from sparsecache.testing.random_checkpoint import make_random_checkpoint

CPU = torch.device("cpu")
NEW_TOKENS = 40


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a checkpoint by type and config fields, made once and not to be changed; norms and biases are random."""
    made: dict[str, Path] = {}

    def make(model_type: str = "llama", **overrides: Any) -> Path:
        settings = {"initializer_range": 0.25, "num_hidden_layers": 2, "max_position_embeddings": 96, **overrides}
        key = json.dumps([model_type, settings], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoint") / model_type
            seed = zlib.crc32(key.encode())  # the same in every selection of tests
            made[key] = make_random_checkpoint(folder, seed=seed, model_type=model_type, **settings)
            _randomise_vectors(folder / "model.safetensors")
        return made[key]

    return make


@pytest.fixture
def folder(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a llama checkpoint that a test may change."""
    return shutil.copytree(make_checkpoint(), tmp_path / "llama")


def _randomise_vectors(file: Path) -> None:
    """Make norm weights and biases random: ones and zeros would hide one that is left out or swapped."""
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(file)
    for tensor in tensors.values():
        if tensor.dim() == 1:
            tensor += torch.randn(tensor.shape, generator=generator) * 0.3
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def make_decoder() -> Callable[..., Decoder]:
    """Return a decoder of a checkpoint folder over a method, calibrated if the method needs it."""

    def make(
        folder: Path,
        method: CacheMethod | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | Sequence[torch.device] = CPU,
    ) -> Decoder:
        checkpoint, method = Checkpoint(folder), method or Vanilla()
        architecture = load_family(checkpoint.model_type).architecture(checkpoint.config)
        weights = checkpoint.load(architecture, device, dtype)
        decoder = Decoder(architecture, weights, Rope(checkpoint.config, weights.embedding.device), method)
        method.check(decoder.shape)
        if text := method.calibration_text():
            token_ids = checkpoint.tokenizer(text)["input_ids"][:300]
            with torch.inference_mode():
                decoder.calibrate(torch.tensor(token_ids, device=decoder.device), lambda layers: None)
        return decoder

    return make


@pytest.fixture(scope="session")
def make_engine(make_decoder: Callable[..., Decoder]) -> Callable[..., Generator]:
    """Return our engine over a checkpoint folder; further arguments as of `make_decoder`."""

    def make(folder: Path, slots: int = 1, method: CacheMethod | None = None, *more: Any) -> Generator:
        return Generator(make_decoder(folder, method, *more), slots)

    return make


@pytest.fixture(scope="session")
def load_reference() -> Callable[..., Any]:
    """Return transformers' model of a folder, greedy, without stop ids."""

    def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        model.generation_config.eos_token_id = None
        return model

    return load


@pytest.fixture(scope="session")
def reference_texts(load_reference: Callable[..., Any]) -> Callable[..., list[list[int]]]:
    """Return the new tokens of each prompt by transformers' generate, each on a freshly loaded model."""

    def texts(folder: Path, prompts: Iterable[list[int]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
        found = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = load_reference(folder).generate(ids, max_new_tokens=new_tokens, do_sample=False)
            found.append(out[0, len(prompt) :].tolist())
        return found

    return texts


@pytest.fixture(scope="session")
def make_prompts() -> Callable[..., list[list[int]]]:
    """Return random prompts of the given lengths."""

    def make(*lengths: int, seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(3, 1024, (length,), generator=generator).tolist() for length in lengths]

    return make


@pytest.fixture(scope="session")
def our_texts() -> Callable[..., list[list[int]]]:
    """Return the new tokens of each prompt by an engine, in the prompts' order; an error fails the test."""

    def texts(engine: Generator, prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
        requests = [Request(key, prompt, new_tokens, ()) for key, prompt in enumerate(prompts)]
        done: dict[int, Completion] = {completion.key: completion for completion in engine.generate(requests)}
        assert [done[key].error for key in range(len(prompts))] == [None] * len(prompts)
        return [done[key].token_ids for key in range(len(prompts))]

    return texts


@pytest.fixture(scope="session")
def last_logits() -> Callable[..., Tensor]:
    """Return the last token's logits of a prompt by our decoder, in newly allocated caches."""

    @torch.inference_mode()
    def logits(decoder: Decoder, prompt: list[int]) -> Tensor:
        decoder.allocate(1, len(prompt) + 1, 1)
        return decoder.prefill(torch.tensor(prompt), 0).float()

    return logits
