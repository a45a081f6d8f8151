"""Logits and greedy text of every family and rotation equal transformers', within and beyond the window."""

import json
import shutil
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsecache.engine.families import family_names

WINDOW = 96
LENGTHS = (7, 190, 60, 97)  # shorter and longer than the window, not in order
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-group1-biases": ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "llama-group2-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-group4-wide-heads": ("llama", {"num_key_value_heads": 1, "head_dim": 24}),
    "mistral-group1": ("mistral", {"num_key_value_heads": 4}),
    "mistral-group2-wide-heads": ("mistral", {"head_dim": 48}),
    "mistral-group4-tied": ("mistral", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2-group1-tied": ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen2-group2": ("qwen2", {}),
    "qwen2-group4-odd-layers": ("qwen2", {"num_key_value_heads": 1, "num_hidden_layers": 3}),
    "qwen3-group1-biases": ("qwen3", {"num_key_value_heads": 4, "attention_bias": True}),
    "qwen3-group2-wide-heads": ("qwen3", {"head_dim": 32}),
    "qwen3-group4-tied": ("qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
}
HALF = 8  # frequencies of a head of 16 dimensions
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    "yarn-mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 16.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 2.0,
        "short_factor": [1.0 + 0.1 * i for i in range(HALF)],
        "long_factor": [2.0 + 0.5 * i for i in range(HALF)],
        "original_max_position_embeddings": 48,
    },
}


def test_every_family_has_variants_here() -> None:
    assert {model_type for model_type, _ in VARIANTS.values()} == set(family_names())


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_text_equal_transformers(
    variant, make_checkpoint, make_decoder, make_engine, load_reference, reference_texts, our_texts, last_logits,
    make_prompts,
) -> None:  # fmt: skip
    model_type, overrides = VARIANTS[variant]
    folder = make_checkpoint(model_type, **overrides)
    prompts = make_prompts(*LENGTHS)
    expected = reference_texts(folder, prompts)
    assert min(len(set(text)) for text in expected) > 16, "the texts must vary, otherwise they show nothing"
    assert our_texts(make_engine(folder, 1), prompts) == expected
    assert our_texts(make_engine(folder, 4), prompts) == expected

    model, decoder = load_reference(folder), make_decoder(folder)
    for prompt in prompts:
        with torch.inference_mode():
            theirs = model(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(last_logits(decoder, prompt), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_type_equals_transformers_whatever_came_before(
    rope, make_checkpoint, make_engine, reference_texts, our_texts, make_prompts
) -> None:
    folder = make_checkpoint("llama", rope_parameters={"rope_theta": 10000.0, **ROPES[rope]})
    prompts = make_prompts(190, 20, 90, 40)  # the longest first; 90 and 40 grow past 96 and 48 while decoding
    expected = reference_texts(folder, prompts, 24)
    assert min(len(set(text)) for text in expected) > 10
    for slots in (1, 4):
        assert our_texts(make_engine(folder, slots), prompts, 24) == expected
    assert our_texts(make_engine(folder, 1), prompts[::-1], 24) == expected[::-1]


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 3.0}, ROPES["llama3"]])
def test_a_config_in_the_old_spelling_rotates_as_in_transformers(
    scaling, make_checkpoint, make_engine, reference_texts, our_texts, make_prompts, tmp_path
) -> None:
    """Published checkpoints have `rope_theta` and `rope_scaling` where transformers now writes `rope_parameters`."""
    folder = shutil.copytree(make_checkpoint(), tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 400.0, "rope_scaling": scaling}))
    prompts = make_prompts(70)
    texts = our_texts(make_engine(folder), prompts)
    assert texts == reference_texts(folder, prompts)
    assert texts != our_texts(make_engine(make_checkpoint()), prompts)


@pytest.mark.parametrize("ratio", [4, 2.5])
def test_the_condensed_rope_of_longchat_is_linear_scaling(
    ratio, make_checkpoint, make_decoder, make_engine, load_reference, reference_texts, our_texts, last_logits,
    make_prompts, tmp_path,
) -> None:  # fmt: skip
    """LongChat configs have `rope_condense_ratio`, which transformers does not read."""
    plain = make_checkpoint()
    config = json.loads((plain / "config.json").read_text())
    scaling = {**config.pop("rope_parameters"), "rope_type": "linear", "factor": ratio}
    changes = {"longchat": {"rope_theta": scaling["rope_theta"], "rope_condense_ratio": ratio}}
    changes["linear"] = {"rope_parameters": scaling}
    for name, change in changes.items():
        shutil.copytree(plain, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **change}))
    longchat, linear = tmp_path / "longchat", tmp_path / "linear"
    prompts = make_prompts(70, 190)
    expected = reference_texts(linear, prompts)
    assert our_texts(make_engine(longchat), prompts) == our_texts(make_engine(linear), prompts) == expected
    assert expected != reference_texts(plain, prompts)
    model, decoder = load_reference(linear), make_decoder(longchat)
    for prompt in prompts:
        with torch.inference_mode():
            theirs = model(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(last_logits(decoder, prompt), theirs, rtol=1e-4, atol=1e-4)


def test_the_rope_types_differ(make_checkpoint, make_engine, our_texts, make_prompts) -> None:
    """Otherwise the test above would pass if all types were decoded alike."""
    prompts = make_prompts(190)
    texts = []
    for rope in ROPES.values():
        folder = make_checkpoint("llama", rope_parameters={"rope_theta": 10000.0, **rope})
        texts += our_texts(make_engine(folder), prompts)
    assert len({tuple(text) for text in texts}) == len(ROPES)


@pytest.mark.parametrize("model_type", family_names())
def test_bfloat16_stays_within_twice_the_error_of_transformers(
    model_type, make_checkpoint, make_decoder, load_reference, last_logits, make_prompts
) -> None:
    folder = make_checkpoint(model_type)
    exact, rounded = load_reference(folder), load_reference(folder, torch.bfloat16)
    decoder = make_decoder(folder, dtype=torch.bfloat16)
    ours, theirs = [], []
    for prompt in make_prompts(5, 33, 150):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            truth = exact(ids).logits[0, -1]
            theirs.append((rounded(ids).logits[0, -1].float() - truth).square().mean())
        ours.append((last_logits(decoder, prompt) - truth).square().mean())
    error, allowed = torch.stack(ours).mean().sqrt(), 2 * torch.stack(theirs).mean().sqrt()
    assert 0 < error <= allowed


class _Sizes(TorchDispatchMode):
    """Records the largest tensor that any operation returns, and the row counts of products with the LM head."""

    def __init__(self, head: torch.Tensor):
        super().__init__()
        self.largest = 0
        self.head_rows: list[int] = []
        self._head = head

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        if "mm" in str(func) and any(each.data_ptr() == self._head.data_ptr() for each in tensors):
            self.head_rows.append(out.numel() // len(self._head))
        return out


def test_prefill_builds_no_square_tensor_and_only_the_last_logits(make_checkpoint, make_decoder, make_prompts) -> None:
    length, vocabulary = 2048, 1024
    decoder = make_decoder(make_checkpoint())
    (prompt,) = make_prompts(length)
    with torch.no_grad():  # inference mode would hide the operations from the recorder
        decoder.allocate(1, length, 1)
        with _Sizes(decoder._weights.head) as sizes:
            logits = decoder.prefill(torch.tensor(prompt), 0)
    assert logits.shape == (vocabulary,)
    assert length * 64 <= sizes.largest < length * length
    assert set(sizes.head_rows) == {1}


def test_the_recorder_sees_a_square_tensor_where_there_is_one() -> None:
    head = torch.ones(7, 5)
    with _Sizes(head) as sizes:
        torch.ones(2, 5) @ head.t()
        torch.ones(300, 2) @ torch.ones(2, 300)
    assert sizes.largest == 300 * 300
    assert 2 in sizes.head_rows
