"""Logits that are NaN or infinite are an error of their sequence, at any token, and of no other sequence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsecache.engine.base import Completion, Request
from sparsecache.engine.generator import Generator
from sparsecache.engine.reference import TransformersEngine
from sparsecache.engine.steps import greedy_tokens
from sparsecache.methods import load_method, make_method, method_names, method_options, parse_options

NEW_TOKENS = 24
STOP_ID = 7
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))
KINDS = [*method_names(), "transformers"]
FEW = ["vanilla", "infinigen", "transformers"]


@pytest.fixture
def new_engine(make_engine: Callable[..., Generator]) -> Callable[..., Any]:
    """Return an engine over a folder: ours over a method that needs no calibration, or that of transformers."""

    def new(folder: Path, kind: str, slots: int, device: str = "cpu") -> Any:
        if kind == "transformers":
            return TransformersEngine.load(folder, torch.device(device), torch.float32)
        given = {"skew": "false"} if "skew" in method_options(load_method(kind)) else {}
        method = make_method(kind, parse_options(kind, given))
        return make_engine(folder, slots, method, torch.float32, torch.device(device))

    return new


def _complete(engine: Any, prompts: list[list[int]], minimum: int = 0) -> list[Completion]:
    requests = [Request(key, prompt, NEW_TOKENS, (STOP_ID,), minimum) for key, prompt in enumerate(prompts)]
    return sorted(engine.generate(requests), key=lambda done: done.key)


def _set_row(folder: Path, name: str, row: int, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][row] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(("kind", "slots"), [*((kind, 3) for kind in KINDS), *((kind, 1) for kind in FEW)])
def test_a_token_after_which_logits_are_nan_makes_its_sequence_an_error(
    kind, slots, device, folder, new_engine, make_prompts
) -> None:
    prompts = make_prompts(30, 45, 38)
    before = _complete(new_engine(folder, kind, slots, device), prompts)
    texts = [done.token_ids for done in before]
    used = [{*prompt, *text} for prompt, text in zip(prompts, texts, strict=True)]
    at, token = next(
        (at, token)
        for at, token in enumerate(texts[1])
        if at and token != STOP_ID and token not in {*prompts[1], *texts[1][:at], *used[0], *used[2]}
    )
    _set_row(folder, "model.embed_tokens.weight", token, torch.nan)
    first, second, third = _complete(new_engine(folder, kind, slots, device), prompts)
    assert second.error is not None and not second.token_ids
    assert second.error.startswith(f"NonFiniteLogits: the logits of new token {at + 2} are NaN or infinite.")
    assert [first.token_ids, third.token_ids] == [texts[0], texts[2]] and first.error is third.error is None


@pytest.mark.parametrize("kind", ["vanilla", "transformers"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("minimum", [0, 1])
def test_one_entry_of_the_vocabulary_is_enough(kind, value, minimum, folder, new_engine, make_prompts) -> None:
    """The logit of token 50 is NaN, or infinite and of the sign of the hidden state."""
    _set_row(folder, "lm_head.weight", 50, value)
    done = _complete(new_engine(folder, kind, 2), make_prompts(20, 9, 14), minimum)
    assert all((each.error or "").startswith("NonFiniteLogits: the logits of new token 1 are") for each in done)


@pytest.mark.parametrize("kind", FEW)  # the last norm comes after all caches
def test_a_norm_of_nan_makes_every_sequence_an_error(kind, folder, new_engine, make_prompts) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(torch.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = _complete(new_engine(folder, kind, 2), make_prompts(20, 9))
    assert all((each.error or "").startswith("NonFiniteLogits") for each in done), done


def test_greedy_tokens_are_the_argmax_of_finite_logits_only() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    logits[3, 2] = -torch.inf  # as masked stop ids are
    assert greedy_tokens(logits).tolist() == logits.argmax(-1).tolist()
    spoiled = logits.clone()
    spoiled[0, 7], spoiled[1, 7], spoiled[2] = torch.nan, torch.inf, -torch.inf
    assert greedy_tokens(spoiled).tolist() == [-1, -1, -1, *logits[3:].argmax(-1).tolist()]
    assert greedy_tokens(torch.full((3,), torch.nan)).item() == -1
