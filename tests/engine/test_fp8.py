"""Decoding in fp8: weights as they are quantised and read, logits against transformers, and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsecache.engine import fp8, weights
from sparsecache.engine.families import family_names, load_family
from sparsecache.engine.loading import Checkpoint
from sparsecache.engine.weights import LayerWeights, Weights
from sparsecache.errors import UsageError
from sparsecache.kernels.fp8 import FP8, Fp8Matrix
from sparsecache.methods import make_method, parse_options
from sparsecache.runner.context import RunContext
from sparsecache.runner.settings import Settings

CPU = torch.device("cpu")
MATRICES = {
    "qkv": ("self_attn", "q k v"),
    "output": ("self_attn", "o"),
    "gate_up": ("mlp", "gate up"),
    "down": ("mlp", "down"),
}


def _round(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes and the scales [M, 1] of the rows of x, by the definition."""
    scale = x.float().abs().amax(-1, keepdim=True) / 448
    return (x.float() / scale).to(FP8), scale


def _load(folder: Path, dtype: torch.dtype) -> Weights:
    checkpoint = Checkpoint(folder)
    architecture = load_family(checkpoint.model_type).architecture(checkpoint.config)
    return checkpoint.load(architecture, CPU, dtype)


def _names(layer: int, field: str) -> list[str]:
    module, names = MATRICES[field]
    return [f"model.layers.{layer}.{module}.{name}_proj.weight" for name in names.split()]


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_projections_are_quantised_by_rows_from_the_stored_values(stored, folder) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    loaded = _load(folder, FP8)
    for index, layer in enumerate(loaded.layers):
        for field in fields(LayerWeights):
            found = getattr(layer, field.name)
            if field.name not in MATRICES:
                assert found is None or found.dtype == torch.bfloat16
                continue
            assert isinstance(found, Fp8Matrix) and found.nbytes == found.values.numel() + 4 * len(found)
            _, scales = _round(torch.cat([tensors[name] for name in _names(index, field.name)]))
            torch.testing.assert_close(found.scales, scales[:, 0])
            exact = torch.cat([tensors[name].float() for name in _names(index, field.name)])
            assert ((found.dequantise(torch.float32) - exact).abs() <= exact.abs() / 15.9 + scales * 2**-10).all()
    assert loaded.embedding.dtype == loaded.head.dtype == loaded.norm.dtype == torch.bfloat16


def _in_fp8(model: nn.Module) -> nn.Module:
    """Round the weights of transformers' projections to fp8, and their inputs."""

    def round_inputs(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        codes, scale = _round(inputs[0])
        return codes.float() * scale

    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            codes, scale = _round(module.weight.data)
            module.weight.data = codes.float() * scale
            module.register_forward_pre_hook(round_inputs)
    return model


@pytest.fixture
def in_float32(monkeypatch) -> None:
    """Compute everything but the projections in float32 instead of bfloat16, so that results compare closely."""
    for module in (fp8, weights):
        monkeypatch.setattr(module, "COMPUTE_DTYPE", torch.float32)


@pytest.mark.parametrize("model_type", family_names())
@torch.inference_mode()
def test_logits_are_those_of_transformers_with_rounded_weights_and_inputs(
    model_type, make_checkpoint, make_decoder, load_reference, make_prompts, in_float32
) -> None:
    folder = make_checkpoint(model_type, initializer_range=0.1)
    exact, rounded = load_reference(folder), _in_fp8(load_reference(folder))
    for length in (9, 40):
        (prompt,) = make_prompts(length + 1)
        decoder = make_decoder(folder, None, FP8)
        decoder.allocate(1, length + 1, 1)
        ours = [decoder.prefill(torch.tensor(prompt[:-1]), 0)]
        ours.append(decoder.step(torch.tensor(prompt[-1:]), torch.tensor([length]), torch.tensor([0]))[0])
        for model, (least, most) in ((rounded, (0, 5e-3)), (exact, (2e-2, 1))):
            theirs = model(torch.tensor([prompt[:-1]]), use_cache=True)
            step = model(torch.tensor([prompt[-1:]]), past_key_values=theirs.past_key_values)
            for found, expected in zip(ours, (theirs.logits[0, -1], step.logits[0, -1]), strict=True):
                error = (found - expected).norm() / expected.norm()
                assert least <= error <= most


@pytest.mark.parametrize("guess", ["input", "residual"])
def test_infinigen_speculates_with_query_weights_in_fp8(
    guess, make_checkpoint, make_engine, make_prompts, our_texts
) -> None:
    """A budget of all tokens must give vanilla's text."""
    folder, prompts = make_checkpoint(), make_prompts(20, 5)
    options = {"guess": guess, "budget": 1.0, "alpha": torch.inf, "dense_layers": 1}
    method = make_method("infinigen", {**parse_options("infinigen", {}), **options})
    decoder_texts = our_texts(make_engine(folder, 2, method, FP8), prompts, 12)
    assert decoder_texts == our_texts(make_engine(folder, 2, None, FP8), prompts, 12)


# Checkpoints that come in fp8

DYNAMIC = {"type": "float", "num_bits": 8, "symmetric": True, "dynamic": True, "strategy": "token"}
WEIGHTS = {"type": "float", "num_bits": 8, "symmetric": True, "dynamic": False, "strategy": "channel"}


def _compressed(
    weights: dict[str, Any] = WEIGHTS, inputs: dict[str, Any] | None = DYNAMIC, **more: Any
) -> dict[str, Any]:
    group = {"weights": weights, "input_activations": inputs, "output_activations": None, "targets": ["Linear"]}
    stated = {"quant_method": "compressed-tensors", "format": "float-quantized", "kv_cache_scheme": None}
    return {**stated, "config_groups": {"group_0": group}, "ignore": ["lm_head"], **more}


FORMATS = {
    "by channel": (_compressed(), lambda scale: scale),
    "by tensor": (_compressed({**WEIGHTS, "strategy": "tensor"}), lambda scale: scale.amax().reshape(1)),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, lambda scale: scale.amax()),
}


def _to_fp8(
    folder: Path, config: dict[str, Any], reduce: Callable[[Tensor], Tensor], head: bool = False
) -> dict[str, Tensor]:
    """Write the projections of a checkpoint in fp8; return what they mean, in float32."""
    _configure(folder, config)
    stored, meant = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored[name], meant[name] = tensor, tensor
        if name.endswith("_proj.weight") or (head and name == "lm_head.weight"):
            scale = reduce(tensor.abs().amax(1, keepdim=True) / 448)
            stored[name] = (tensor / scale).clamp(-448, 448).to(FP8)
            stored[f"{name}_scale"] = scale.clone()
            meant[name] = stored[name].float() * scale
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return meant


def _configure(folder: Path, config: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))


@pytest.mark.parametrize("form", FORMATS)
def test_a_checkpoint_in_fp8_is_read_as_stored(
    form, folder, tmp_path, make_engine, our_texts, reference_texts, make_prompts
) -> None:
    """In another dtype it decodes as transformers does with the values that it means."""
    plain = shutil.copytree(folder, tmp_path / "plain")
    meant = _to_fp8(folder, *FORMATS[form], head=form == "by channel")
    save_file(meant, plain / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint(folder)
    assert checkpoint.is_fp8
    checkpoint.check_format("sparsecache")
    checkpoint.check_weights(load_family("llama").architecture(checkpoint.config))
    for index, layer in enumerate(_load(folder, FP8).layers):
        for field in MATRICES:
            expected = torch.cat([meant[name] for name in _names(index, field)])
            assert torch.equal(getattr(layer, field).dequantise(torch.float32), expected)
    prompts = make_prompts(20, 7)
    assert our_texts(make_engine(folder), prompts, 12) == reference_texts(plain, prompts, 12)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "its weights have a scale per block"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "its activations have static scales"),
        (_compressed(inputs={**DYNAMIC, "dynamic": False}), "its activations have static scales"),
        (_compressed(inputs=None), "its weights or its activations are not quantised"),
        (_compressed({**WEIGHTS, "strategy": "block"}), "its weights have scales by block, not by channel or tensor"),
        (_compressed({**WEIGHTS, "type": "int"}), "it is not symmetric fp8"),
        (_compressed(format="pack-quantized"), "its format is pack-quantized, not float-quantized"),
        (_compressed(kv_cache_scheme={"num_bits": 8}), "its keys and values have scales"),
        (_compressed(inputs={**DYNAMIC, "strategy": "tensor"}), "its activations have scales by tensor, not by token"),
        (_compressed(transform_config={"config_groups": {"u": {}}}), "its weights and activations are rotated"),
        (_compressed(sparsity_config={"format": "sparse-24-bitmask"}), "its weights are stored as sparse"),
        (_compressed(config_groups={}), "it has no config_groups"),
        (_compressed(config_groups={"a": 3}), "its weights or its activations are not quantised"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_quantisation_is_refused_by_name(config, why, folder) -> None:
    _configure(folder, config)
    checkpoint = Checkpoint(folder)
    assert not checkpoint.is_fp8
    with pytest.raises(UsageError, match=f"quantised by {config['quant_method']} .*, and {why}"):
        checkpoint.check_format("sparsecache")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t, name: t.pop(f"{name}_scale"), "in fp8 without {}_scale. Download it again."),
        (lambda t, name: t.update({f"{name}_scale": torch.ones(3, 1)}), "{}_scale of shape [3, 1] for a weight of"),
        (lambda t, name: t.update({f"{name}_scale_inv": t.pop(f"{name}_scale")}), "{}_scale_inv: scales per block"),
        (lambda t, name: t.update({f"{name[:-6]}input_scale": torch.ones(1)}), "scaled weights"),
        (lambda t, name: t.update({name: t[name].float().to(torch.float8_e5m2)}), "as float8_e5m2"),
        (lambda t, name: t.pop(name), "quantised"),
        (lambda t, name: t[f"{name}_scale"][5].fill_(torch.nan), "{}_scale with numbers that are not finite and above"),
        (lambda t, name: t[f"{name}_scale"].zero_(), "{}_scale with numbers that are not finite and above 0"),
        (lambda t, name: t.update({f"{name}_scale": torch.ones(1, dtype=torch.int8)}), "{}_scale as torch.int8, not"),
    ],
    ids=["no scale", "short", "blocks", "static", "e5m2", "no weight", "nan", "zeros", "int8"],
)
def test_scales_that_do_not_fit_are_refused_by_name(change, why, folder) -> None:
    _to_fp8(folder, *FORMATS["by channel"])
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    change(tensors, name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError) as refused:
        _load(folder, FP8)
    assert why.format(name) in str(refused.value)


# Runs


def test_fp8_needs_a_gpu_and_this_engine(folder, monkeypatch) -> None:
    with pytest.raises(
        UsageError, match="^--dtype fp8 needs an NVIDIA GPU .* and cpu is not a GPU. Use --dtype float32.$"
    ):
        RunContext(Settings(str(folder), dtype="fp8", device="cpu"))
    for more in ({"engine": "transformers"}, {"verify": 1}):
        with pytest.raises(UsageError, match="--dtype fp8 needs --engine sparsecache without --verify"):
            RunContext(Settings(str(folder), dtype="fp8", device="cpu", **more))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(UsageError, match="and A100 has 8.0. Use --dtype bfloat16"):
        fp8.check_fp8_devices([torch.device("cuda")])


def test_a_run_in_fp8_is_another_run(folder, monkeypatch) -> None:
    """Its dtype is in the identity. A checkpoint in fp8 is decoded in it on a GPU, and dequantised on a CPU."""
    monkeypatch.setattr("sparsecache.runner.checks.check_fp8_devices", lambda devices: None)
    context = RunContext(Settings(str(folder), dtype="fp8", device="cpu"))
    assert context.identity()["dtype"] == "fp8"
    assert isinstance(context.load_model().weights.layers[0].qkv, Fp8Matrix)
    _to_fp8(folder, *FORMATS["fp8"])
    context = RunContext(Settings(str(folder), device="cpu"))
    assert context.dtype_name == "float32"
    context.device = torch.device("cuda")
    assert context.dtype_name == "fp8" and context.dtype == FP8
