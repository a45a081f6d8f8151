"""InfiniGen in a model: no loss where none is allowed, and texts that depend on their prompt alone."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecache.engine.base import Request
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.families import family_names, load_family
from sparsecache.engine.generator import Generator
from sparsecache.engine.loading import Checkpoint
from sparsecache.engine.rope import Rope
from sparsecache.kernels import attention, decode
from sparsecache.methods.infinigen import InfiniGen
from sparsecache.methods.vanilla import Vanilla

CPU = torch.device("cpu")
PROMPT = [0, *range(300, 345)]
every_family = pytest.mark.parametrize("model_type", family_names())


@torch.inference_mode()
def _compare_logits(first: Decoder, second: Decoder, prompt: list[int], steps: int) -> dict[str, Any]:
    """Give both the tokens that the first finds most likely; all logits must agree. Return the second's report."""
    token_ids, slot = torch.tensor(prompt), torch.tensor([1])
    for each in (first, second):
        each.allocate(2, len(prompt) + steps, steps)
    logits = [each.prefill(token_ids, 1) for each in (first, second)]
    for at in range(steps - 1):
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
        best = logits[0].argmax()
        assert best == logits[1].argmax()
        position = torch.tensor([len(prompt) + at])
        logits = [each.step(best[None], position, slot)[0] for each in (first, second)]
    assert second.cache is not None
    return second.cache.report(1)


@every_family
@pytest.mark.parametrize(
    "options",
    [
        {"dense_layers": 1},
        {"dense_layers": 2, "fetch": "per_head", "skew": False},
        {"dense_layers": 1, "offload": True, "gpu_cache": 5, "guess": "residual", "partial_weight_ratio": 0.25},
        {"dense_layers": 1, "partial_bits": 8, "partial_weight_ratio": 0.5},
        {"dense_layers": 1, "offload": True, "partial_bits": 4, "partial_weight_ratio": 1.0},
    ],
    ids=["defaults", "per head, unskewed", "offloaded", "8 bits", "4 bits"],
)
def test_without_limits_the_logits_are_those_of_vanilla(options, model_type, decoder) -> None:
    ours = decoder(model_type, InfiniGen(budget=1.0, alpha=math.inf, **options))
    report = _compare_logits(decoder(model_type, Vanilla()), ours, PROMPT, 14)
    assert report["kept"] == 1.0 and report["sparse_steps"] == 13


@every_family
def test_with_dense_layers_alone_the_logits_are_those_of_vanilla(model_type, decoder) -> None:
    ours = decoder(model_type, InfiniGen(budget=0.01, alpha=0.0, dense_layers=3))
    report = _compare_logits(decoder(model_type, Vanilla()), ours, PROMPT, 14)
    assert report == {"kept": None, "sparse_steps": 0, "capped_steps": 0, "dense_layers": 3}


@every_family
def test_limits_change_the_logits(model_type, decoder) -> None:
    """Otherwise the two tests above would show nothing."""
    ours = decoder(model_type, InfiniGen(budget=3, alpha=1.0, dense_layers=1))
    with pytest.raises(AssertionError):
        _compare_logits(decoder(model_type, Vanilla()), ours, PROMPT, 14)


def test_the_bundled_checkpoint_loses_nothing_without_limits_and_drops_most_with_the_defaults(repo) -> None:
    folder = repo / "sparsecache" / "demo" / "checkpoint"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no trained checkpoint in {folder}")
    found = Checkpoint(folder)
    architecture = load_family(found.model_type).architecture(found.config)
    weights = found.load(architecture, CPU, torch.float32)
    lossless, defaults = InfiniGen(budget=1.0, alpha=math.inf), InfiniGen()
    made = [Decoder(architecture, weights, Rope(found.config, CPU), each) for each in (Vanilla(), lossless, defaults)]
    token_ids = found.tokenizer(str(lossless.calibration_text()))["input_ids"]
    with torch.inference_mode():
        made[1].calibrate(torch.tensor(token_ids[:600]), lambda layers: None)
    defaults.restore(lossless.calibration(), made[2].shape)
    _compare_logits(made[0], made[1], token_ids[-300:], 10)
    (done,) = Generator(made[2], 1).generate([Request(0, token_ids[-300:], 10, ())])
    assert done.error is None and 0 < done.report["kept"] < 0.2


def test_prefill_and_decode_use_the_plain_attention_functions_of_the_kernels(decoder, monkeypatch) -> None:
    calls: list[tuple[str, int, int]] = []
    of_prompt, over_rows = attention.attention, attention.attention_over_rows

    def note_prompt(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append(("prompt", q.shape[2], k.shape[2]))
        return of_prompt(q, k, v, **options)

    def note_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        calls.append(("rows", q.shape[2], k.shape[2]))
        return over_rows(q, k, v, mask)

    monkeypatch.setattr(attention, "attention", note_prompt)
    monkeypatch.setattr(decode, "attention_over_rows", note_rows)
    method = InfiniGen(dense_layers=1, skew=False, budget=2)
    (done,) = Generator(decoder("llama", method), 1).generate([Request(0, [0, 7, 8, 9], 3, ())])
    assert done.error is None
    prompt = [("prompt", 4, 4), ("prompt", 4, 4), ("prompt", 1, 4)]  # the last layer attends with the last token
    assert calls[:3] == prompt
    steps = [[kv_len for kind, q_len, kv_len in calls[3:] if (kind, q_len) == ("rows", 1)][at::3] for at in range(3)]
    assert steps[0] == [5, 6], "the dense layer reads everything"
    assert all(2 <= kv_len <= 3 for kv_len in (*steps[1], *steps[2])), "a sparse one what is selected and the new token"


@pytest.mark.parametrize(
    "options",
    [
        {"offload": True, "gpu_cache": 6},
        {"sinks": 2, "recent": 2, "guess": "residual"},
        {"offload": True, "gpu_cache": 9, "fetch": "per_head", "budget": 0.3},
        {"partial_bits": 4, "partial_weight_ratio": 1.0, "offload": True},
        {"partial_bits": 8, "partial_weight_ratio": 0.5},
    ],
    ids=str,
)
def test_a_text_and_its_report_depend_on_its_prompt_alone(options, decoder) -> None:
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, 1024, (length,), generator=generator).tolist() for length in (50, 6, 31)]

    def texts(slots: int, order: list[int]) -> dict[int, Any]:
        method = InfiniGen(**{"budget": 5, "alpha": 3.0, "dense_layers": 1, **options})
        done = Generator(decoder("qwen2", method), slots).generate(Request(at, prompts[at], 16, ()) for at in order)
        return {each.key: (each.error, each.token_ids, each.report) for each in done}

    alone = {at: texts(1, [at])[at] for at in range(3)}
    assert all(error is None for error, _, _ in alone.values())
    for slots, order in ((1, [1, 0, 1, 2]), (2, [2, 1, 0]), (3, [0, 1, 2]), (3, [1, 0, 1, 2])):
        assert texts(slots, order) == alone
