"""Weights in a form that is not decoded are refused by name, before any of them is read."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from sparsecache.engine.families import load_family
from sparsecache.engine.loading import Checkpoint
from sparsecache.errors import UsageError


def _change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _open(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    checkpoint.check_format("sparsecache")
    checkpoint.check_vocabulary()
    checkpoint.check_weights(load_family(checkpoint.model_type).architecture(checkpoint.config))


def _rename(folder: Path, prefix: str) -> None:
    file = folder / "model.safetensors"
    save_file({f"{prefix}{name}": tensor for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "bitnet"},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"load_in_4bit": True, "quant_method": "bitsandbytes"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "never-heard-of"},
    ],
    ids=lambda value: value["quant_method"],
)
def test_a_quantization_config_is_named(quantization, folder) -> None:
    _change_config(folder, quantization_config=quantization)
    with pytest.raises(UsageError, match=f"quantised by {quantization['quant_method']}"):
        _open(folder)


def test_a_missing_package_is_named_with_the_engine_that_needs_it(folder, monkeypatch) -> None:
    _change_config(folder, quantization_config={"load_in_8bit": True, "quant_method": "bitsandbytes"})

    def missing(*arguments: object, **more: object) -> None:
        raise ImportError("bitsandbytes is missing: `pip install bitsandbytes`.")

    monkeypatch.setattr(Bnb8BitHfQuantizer, "validate_environment", missing)
    for engine in ("sparsecache", "transformers"):
        with pytest.raises(UsageError) as caught:
            Checkpoint(folder).check_format(engine)
        assert str(caught.value) == (
            f"{folder} is quantised by bitsandbytes (quantization_config of config.json), which needs --engine "
            f"transformers and a missing package. bitsandbytes is missing: `pip install bitsandbytes`."
        )


def test_a_method_whose_packages_are_installed_is_left_to_transformers(folder, monkeypatch) -> None:
    _change_config(folder, quantization_config={"load_in_8bit": True, "quant_method": "bitsandbytes"})
    monkeypatch.setattr(Bnb8BitHfQuantizer, "validate_environment", lambda *arguments, **more: None)
    Checkpoint(folder).check_format("transformers")
    with pytest.raises(UsageError, match="which needs --engine transformers. Use that, or the unquantised checkpoint"):
        Checkpoint(folder).check_format("sparsecache")


def test_a_quantization_config_in_text_config_counts_too(folder) -> None:
    _change_config(folder, text_config={"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(UsageError, match="quantised"):
        _open(folder)


def test_integer_weights_without_a_config_are_quantised(folder) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = (tensors[name] * 100).to(torch.int8)
    save_file(tensors, file)
    with pytest.raises(UsageError, match="quantised: it stores"):
        _open(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_prefixed_names_are_called_by_their_source(prefix, folder) -> None:
    _rename(folder, prefix)
    with pytest.raises(UsageError, match=prefix.replace(".", r"\.")):
        _open(folder)


def test_an_adapter_folder_is_called_one(folder) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    with pytest.raises(UsageError, match=r"(?i)adapter|LoRA"):
        _open(folder)


def test_two_sets_of_weights_are_refused(folder) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "part.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index = {"weight_map": dict.fromkeys(names, "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="two sets of weights"):
        _open(folder)
    os.unlink(folder / "model.safetensors")
    _open(folder)


@pytest.mark.parametrize("shard", ["shards/a.safetensors", "../a.safetensors", "/etc/passwd", "a.bin", "", ".."])
def test_a_shard_lies_in_the_folder_and_has_its_suffix(shard, folder) -> None:
    names = load_file(folder / "model.safetensors")
    target = folder / shard if shard and not shard.startswith(("/", "..")) else folder / "a.safetensors"
    target.parent.mkdir(exist_ok=True)
    (folder / "model.safetensors").rename(target)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    with pytest.raises(UsageError, match="shard"):
        _open(folder)


@pytest.mark.parametrize(
    "field",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**12},
        {"vocab_size": 10**10},
        {"num_attention_heads": 0},
        {"head_dim": -4},
        {"num_key_value_heads": 3},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": float("inf")},
        {"rms_norm_eps": 0},
    ],
    ids=str,
)
def test_a_size_that_no_model_has_is_refused_by_its_field(field, folder) -> None:
    _change_config(folder, **field)
    with pytest.raises(UsageError, match=next(iter(field))):
        _open(folder)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(folder) -> None:
    _change_config(folder, vocab_size=1000)
    with pytest.raises(UsageError, match=r"(?i)vocabulary|token"):
        _open(folder)
