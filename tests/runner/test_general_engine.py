"""Runs of the general engine from the command line."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Llama4TextConfig,
    Phi3Config,
    PreTrainedConfig,
)

SIZES = {
    "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "sliding_window": 16, "bos_token_id": 1,
    "eos_token_id": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip


@pytest.fixture
def make_checkpoint(tiny: Path, tmp_path: Path) -> Callable[[PreTrainedConfig], Path]:
    """Return a checkpoint of a configuration with random weights and the tokenizer of another one."""

    def make(config: PreTrainedConfig) -> Path:
        folder = shutil.copytree(tiny, tmp_path / config.model_type)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    return make


def test_a_method_serves_the_full_attention_layers_of_a_sliding_family(
    predict, make_checkpoint, tmp_path, read_rows, read_record
) -> None:
    """The prompts are decoded together; one by one they give the same rows."""
    folder = make_checkpoint(Gemma3TextConfig(**SIZES))
    options = ("--method", "infinigen", "-o", "budget=8", "-o", "dense_layers=1", "--max_samples", "2")
    rows = {}
    for batch_size in ("2", "1"):
        name = f"batch-{batch_size}"
        told = predict(
            "--model", str(folder), "--engine", "transformers", "--batch_size", batch_size, "--name", name, *options
        )
        assert told.exit_code == 0, told.output
        assert "layers      2 of 4 have full attention" in told.stdout
        run = tmp_path / "pred" / folder.name / name
        session = read_record(run)["sessions"][-1]
        assert (session["full_attention_layers"], session["layers"]) == (2, 4)
        rows[batch_size] = sorted((row["_id"], row["pred"], row["kept"]) for row in read_rows(run / "qasper.jsonl"))
        for row in read_rows(run / "qasper.jsonl"):
            assert (row["full_attention_layers"], row["dense_layers"]) == (2, 1) and 0 < row["kept"] < 0.5
    assert rows["1"] == rows["2"] and len(rows["1"]) == 2


def test_a_model_that_no_cache_serves_is_refused_in_one_sentence(predict, make_checkpoint, tmp_path, read_rows) -> None:
    folder = make_checkpoint(Gemma2Config(**SIZES))
    told = predict("--model", str(folder), "--engine", "transformers", "--method", "snapkv")
    assert told.exit_code == 2
    assert "Gemma2ForCausalLM has logit soft-capping" in told.output and "Traceback" not in told.output
    texts = {}
    for batch_size in ("2", "1"):
        options = ("--engine", "transformers", "--max_samples", "2", "--batch_size", batch_size, "--name", batch_size)
        told = predict("--model", str(folder), *options)
        assert told.exit_code == 0
        shown = "prompts     decoded one at a time, since transformers' own generate decodes it" in told.stdout
        assert shown == (batch_size == "2")
        rows = read_rows(tmp_path / "pred" / folder.name / batch_size / "qasper.jsonl")
        texts[batch_size] = [row["pred"] for row in rows]
    assert texts["2"] == texts["1"]


def test_the_full_cache_is_decoded_as_the_methods_are(
    predict, make_checkpoint, tmp_path, read_rows, read_record
) -> None:
    """In a batch by the general engine, whose costs are comparable; one by one by transformers' own generate."""
    folder = make_checkpoint(Gemma3TextConfig(**SIZES))
    rows, caches = {}, {}
    for batch_size in ("2", "1"):
        options = ("--engine", "transformers", "--batch_size", batch_size, "--name", batch_size, "--max_samples", "3")
        told = predict("--model", str(folder), *options)
        assert told.exit_code == 0, told.output
        assert ("2 of 4 have full attention" in told.stdout) == (batch_size == "2")
        run = tmp_path / "pred" / folder.name / batch_size
        rows[batch_size] = sorted((row["_id"], row["pred"]) for row in read_rows(run / "qasper.jsonl"))
        caches[batch_size] = read_record(run)["sessions"][-1].get("cache")
    assert rows["1"] == rows["2"] and len(rows["1"]) == 3
    assert caches["2"] and not caches["1"]


PLAIN = {key: value for key, value in SIZES.items() if key not in ("layer_types", "sliding_window")}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            Llama4TextConfig(**PLAIN, num_local_experts=2, intermediate_size_mlp=64, floor_scale=32),
            "it scales queries by the length of the longest sequence",
        ),
        (
            Phi3Config(
                **{**PLAIN, "hidden_size": 64},
                original_max_position_embeddings=64,
                rope_parameters=LONGROPE,
                pad_token_id=0,
            ),
            "longrope RoPE depends on the longest sequence",
        ),
    ],
    ids=["llama4", "phi3"],
)
def test_a_model_whose_sequences_depend_on_each_other_decodes_one_at_a_time(
    config, reason, predict, make_checkpoint, tmp_path, read_rows
) -> None:
    """The full cache is then transformers' own generate, with any --batch_size."""
    folder, texts = make_checkpoint(config), {}
    for method, why in (("vanilla", "transformers' own generate decodes it"), ("h2o", reason)):
        for batch_size in ("4", "1"):
            name = f"{method}-{batch_size}"
            options = ("--engine", "transformers", "--batch_size", batch_size, "--name", name, "--max_samples", "4")
            told = predict("--model", str(folder), "--method", method, *options)
            assert told.exit_code == 0, told.output
            assert (f"decoded one at a time, since {why}" in told.stdout) == (batch_size == "4")
            texts[name] = [row["pred"] for row in read_rows(tmp_path / "pred" / folder.name / name / "qasper.jsonl")]
    assert texts["vanilla-4"] == texts["vanilla-1"]
    assert sorted(texts["h2o-4"]) == sorted(texts["h2o-1"])


def test_options_that_do_not_fit_the_model_are_refused(predict, make_checkpoint) -> None:
    folder = make_checkpoint(Gemma3TextConfig(**SIZES))
    options = ("--method", "snapkv", "-o", "dense_layers=3")
    told = predict("--model", str(folder), "--engine", "transformers", *options)
    assert told.exit_code == 2 and "dense_layers=3 must be 0 to 2" in told.output
