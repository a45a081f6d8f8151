"""Recognise checkpoints whose weights this engine cannot decode, and describe their format.

A format shows in fields of config.json and files beside it (`describe_quantization`), in file names
(`describe_folder`), or in names and dtypes of tensors (`describe_tensors`). Each function returns the text of an error,
with a hint what to use instead, or None.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from sparsecache.engine.config_checks import read_json
from sparsecache.engine.fp8 import find_unsupported
from sparsecache.engine.stored import StoredTensor
from sparsecache.errors import UsageError, one_line

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_UNQUANTISED = "Use the checkpoint that it was made from, in bfloat16 or float16."
_SIDE_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # AutoGPTQ, AutoAWQ, ModelOpt
_FIELDS = ("quantization_config", "quantization", "compression_config", "quant_config", "quant_method")

# Files of other formats: (pattern of the file name, the format, the hint).
_OTHER_FORMATS = (
    (r"adapter_config\.json|adapter_model\.(safetensors|bin)", "a PEFT adapter, such as LoRA, not a whole model",
     "Merge it into its base model{base} with peft's merge_and_unload(), save that, and pass its folder."),
    (r"consolidated.*\.(pth|pt|safetensors)|params\.json", "weights in the publisher's own (consolidated) format",
     "Use the checkpoint in Hugging Face format, with model.safetensors."),
    (r".*\.distcp|\.metadata|pytorch_model_fsdp.*", "shards of an FSDP training run",
     "Join them with `accelerate merge-weights` and pass the result."),
    (r"zero_to_fp32\.py|global_step\d+|.*_(model|optim)_states\.pt|latest", "a DeepSpeed training checkpoint",
     "Join it with its zero_to_fp32.py and pass the result."),
    (r".*\.gguf", "GGUF weights", "Pass the file itself: --model {file}."),
    (r".*\.onnx(_data)?|onnx", "an ONNX export", "Use the PyTorch checkpoint."),
    (r"tf_model.*\.h5|.*\.tflite|saved_model\.pb|.*\.ckpt\..*", "TensorFlow weights", "Use the PyTorch checkpoint."),
    (r"flax_model.*\.msgpack", "Flax weights", "Use the PyTorch checkpoint."),
    (r"openvino_model.*", "an OpenVINO export", "Use the PyTorch checkpoint."),
    (r"checkpoint-\d+", "a trainer's output folder", "Pass one of the checkpoints in it: --model {file}."),
    (r"optimizer\.(pt|bin)|trainer_state\.json", "a training state without the model's weights",
     "Save the model with save_pretrained and pass that folder."),
    (r"model-\d+-of-\d+\.safetensors", "shards without their index, model.safetensors.index.json",
     "Download the checkpoint again, whole."),
    (r".*\.(pth|pt|ckpt)", "weights in a format that transformers does not name",
     "Save the model with save_pretrained and pass that folder."),
)  # fmt: skip

# Tensor names: (pattern, quantisation method). The first match counts.
_QUANTISED_NAMES = (
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\.(SCB|absmax|quant_map|weight_format)$|\.quant_state\.|nested_absmax", "bitsandbytes"),
    (r"\.(weight_packed|weight_shape)$", "compressed-tensors"),
    (r"_blocks$", "MXFP4"),
    (r"\.(weight_scale(_inv)?|input_scale|output_scale|[kv]_scale|scales?|biases|zeros|qscale)$", "scaled weights"),
)
_PREFIXES = (
    ("_orig_mod.", "torch.compile", "Save model._orig_mod"),
    ("module.", "DataParallel or FSDP", "Save model.module"),
    ("base_model.model.", "PEFT", "Save what merge_and_unload() returns"),
    ("model.language_model.", "a vision-language model", "Save its language model alone"),
    ("language_model.", "a vision-language model", "Save its language model alone"),
    ("transformer.", "another architecture, such as GPT-2", "Convert it to transformers' names"),
    ("model.model.", "a wrapper around the model", "Save the model itself"),
)


def describe_quantization(path: Path, config: Mapping[str, Any], engine: str) -> str | None:
    """Describe the quantisation stated in config.json or in files beside it; None if there is none.

    engine: the one that loads the weights. transformers loads the methods that it knows and has the packages for; this
    project's engine loads unquantised floats, and fp8 in which `find_unsupported` finds nothing.
    """
    where, settings = _find_quantization(path, config)
    if where is None:
        return None
    method = _method(settings)
    found = f"{path} is quantised by {method} ({where})"
    if engine == "sparsecache" and method in ("fp8", "compressed-tensors"):
        unsupported = find_unsupported(config.get("quantization_config"))
        if unsupported is None:
            return None
        found = f"{found}, and {unsupported}"
    try:
        refusal = _transformers_refusal(config)
    except ImportError as error:  # it names the package, and how to install it
        return f"{found}, which needs --engine transformers and a missing package. {one_line(error).rstrip('.')}."
    if refusal is not None:
        return f"{found}, which is not supported: {refusal.rstrip('.')}. {_UNQUANTISED}"
    if engine == "transformers":
        return None
    return f"{found}, which needs --engine transformers. Use that, or the unquantised checkpoint."


def describe_folder(path: Path) -> str:
    """Describe the contents of a folder without weights or without config.json."""
    names = sorted(entry.name for entry in path.iterdir())
    for pattern, what, hint in _OTHER_FORMATS:
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            file = path / found[0]
            return f"{path} holds {what} ({_few(found)}). {hint.format(file=file, base=_base_model(path))}"
    return f"{path} holds no weights" + (f"; it holds {_few(names)}." if names else ": it is empty.")


def describe_tensors(path: Path, tensors: Mapping[str, StoredTensor], expected: Iterable[str]) -> str | None:
    """Describe quantised, wrapped or renamed tensors; None if there are none. expected: the right names."""
    expected = set(expected)
    for name, tensor in tensors.items():
        if name in expected and tensor.dtype not in FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            return f"{path} is quantised: it stores {name} as {kind}. {_UNQUANTISED}"
    extra = sorted(tensors.keys() - expected)
    for pattern, method in _QUANTISED_NAMES:
        for name in extra:
            if re.search(pattern, name):
                return f"{path} is quantised ({method}): it holds {name}. {_UNQUANTISED}"
    if any(".lora_A" in name or ".lora_B" in name for name in extra):
        return (
            f"{path} holds LoRA tensors beside the weights. Merge them with peft's merge_and_unload(), save the "
            f"result, and pass its folder."
        )
    if extra and not expected & tensors.keys():
        return _describe_names(path, extra, expected)
    return None


def _describe_names(path: Path, names: list[str], expected: set[str]) -> str | None:
    for prefix, source, hint in _PREFIXES:
        is_prefixed = all(name.startswith(prefix) for name in names)
        if is_prefixed and any(_bare(name[len(prefix) :], expected) for name in names):
            return (
                f"{path} names its tensors {prefix}... as {source} does. {hint} with save_pretrained, or rename "
                f"them without the prefix."
            )
    if any(f"model.{name}" in expected for name in names):
        return (
            f"{path} names its tensors without the leading `model.` ({names[0]}). Use --engine transformers, or "
            f"save the model with its head by save_pretrained."
        )
    return None


def _bare(name: str, expected: set[str]) -> bool:
    return name in expected or f"model.{name}" in expected


def _find_quantization(path: Path, config: Mapping[str, Any]) -> tuple[str | None, Any]:
    """Return where quantisation is stated, and its settings."""
    for field, value in _walk(config):
        if field.rsplit(".", 1)[-1] in _FIELDS and value not in (None, False):
            return f"{field} of config.json", value
    for name in _SIDE_FILES:
        if (path / name).exists():
            return name, read_json(path / name)
    return None, None


def _walk(config: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterable[tuple[str, Any]]:
    for name, value in config.items():
        yield f"{prefix}{name}", value
        if isinstance(value, Mapping) and name not in _FIELDS and depth < 8:
            yield from _walk(value, f"{prefix}{name}.", depth + 1)


def _method(settings: Any) -> str:
    if isinstance(settings, str):
        return settings
    if isinstance(settings, Mapping):
        inner = settings.get("quantization")
        named = {**inner, **settings} if isinstance(inner, Mapping) else settings
        for field in ("quant_method", "quant_algo", "quantization_method"):
            if isinstance(named.get(field), str):
                return str(named[field])
        if "w_bit" in settings:
            return "awq"
        if {"group_size", "bits"} <= settings.keys():
            return "gptq" if "desc_act" in settings else "MLX"
    return "an unnamed method"


def _transformers_refusal(config: Mapping[str, Any]) -> str | None:
    """Return why transformers cannot load these weights on this machine; None if it can.

    Raises ImportError if a package is missing.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    inner = config.get("text_config")
    settings = config.get("quantization_config") or (isinstance(inner, dict) and inner.get("quantization_config"))
    if not isinstance(settings, dict):
        return "transformers reads `quantization_config` of config.json only, and there is none"
    try:
        if not AutoHfQuantizer.supports_quant_method(settings):
            return f"transformers does not know the method {settings.get('quant_method')!r}"
        AutoHfQuantizer.from_config(dict(settings), pre_quantized=True).validate_environment(
            dtype=torch.bfloat16, device_map=None, weights_only=True
        )
    except ImportError:
        raise
    except Exception as error:  # a GPU that is missing, settings that do not fit
        return f"transformers cannot load it ({one_line(error)})"
    return None


def _base_model(path: Path) -> str:
    try:
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
    except UsageError:
        return ""
    return f" ({base})" if isinstance(base, str) else ""


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
