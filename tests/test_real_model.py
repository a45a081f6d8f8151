"""A real instruct model from PyPI: its texts are those of transformers."""

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparsecache.engine.base import Request
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.families import load_family
from sparsecache.engine.generator import Generator
from sparsecache.engine.loading import Checkpoint
from sparsecache.engine.reference import TransformersEngine
from sparsecache.engine.rope import Rope
from sparsecache.methods.vanilla import Vanilla

gguf = pytest.importorskip("gguf")
PROJECT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
QUESTIONS = ["What is the capital of France?", "中国的首都是哪里？", "Write the numbers 1 22 333 backwards."]


@pytest.fixture(scope="module", autouse=True)
def _the_file_is_parsed_once() -> Iterator[None]:
    """transformers parses a GGUF file four times to load a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        yield


@pytest.fixture(scope="module")
def model() -> Path:
    """SmolLM2-135M-Instruct, downloaded once into the cache folder."""
    command = [sys.executable, str(PROJECT / "scripts" / "fetch_model.py"), "smollm2-135m-instruct"]
    told = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
    if told.returncode:
        pytest.skip(f"the model could not be downloaded: {told.stderr.strip()[-200:]}")
    return Path(told.stdout.strip())


@pytest.fixture(scope="module")
def checkpoint(model: Path) -> Checkpoint:
    return Checkpoint(model)


def _prompts(checkpoint: Checkpoint) -> list[list[int]]:
    rendered = [
        checkpoint.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in QUESTIONS
    ]
    return [checkpoint.tokenizer.encode(text, add_special_tokens=False) for text in rendered]


def test_texts_equal_transformers_and_make_sense(checkpoint) -> None:
    architecture = load_family(checkpoint.model_type).architecture(checkpoint.config)
    weights = checkpoint.load(architecture, CPU, torch.float32)
    decoder = Decoder(architecture, weights, Rope(checkpoint.config, CPU), Vanilla())
    requests = [Request(at, prompt, 24, tuple(checkpoint.stop_ids)) for at, prompt in enumerate(_prompts(checkpoint))]
    ours = {done.key: done.token_ids for done in Generator(decoder, 3).generate(requests)}
    reference = TransformersEngine.load(checkpoint.path, CPU, torch.float32)
    theirs = {done.key: done.token_ids for done in reference.generate(requests)}
    assert ours == theirs
    assert "Paris" in checkpoint.tokenizer.decode(ours[0], skip_special_tokens=True)


def test_the_chat_template_opens_with_the_bos_token_once_per_turn(checkpoint) -> None:
    """ChatML whose bos_token is <|im_start|>: the BOS token occurs in every turn, which is no mistake."""
    tokenizer = checkpoint.tokenizer
    for prompt in _prompts(checkpoint):
        assert prompt[0] == tokenizer.bos_token_id
        assert prompt[1] != tokenizer.bos_token_id
        assert prompt.count(tokenizer.bos_token_id) >= 2
