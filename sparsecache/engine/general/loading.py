"""Load a model with transformers. Code from the checkpoint is never run."""

import copy
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from sparsecache.engine.gguf_file import isolated_folder
from sparsecache.errors import UsageError, one_line


def load_model(
    path: Path, devices: Sequence[torch.device], dtype: torch.dtype, allow_pickle: bool = False, config: Any = None
) -> Any:
    """Load a checkpoint folder or GGUF file to a device, or its layers to several in equal parts.

    config: a configuration to use instead of the checkpoint's own. A quantised checkpoint is loaded as transformers
    does, with `dtype` for the tensors that are not quantised. Raises UsageError if transformers cannot load it without
    running its code, if weights are missing, if scales of weights would be ignored, or if several devices need a
    package that is missing.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    try:
        if path.suffix == ".gguf":
            model, loading_info = _load_gguf(path, {**options, **_placement(devices, False), "config": config})
        else:
            config = _with_default_attention(config or AutoConfig.from_pretrained(path, trust_remote_code=False))
            options |= _placement(devices, getattr(config, "quantization_config", None) is not None)
            use_safetensors = None if allow_pickle else True
            model, loading_info = AutoModelForCausalLM.from_pretrained(
                path, config=config, use_safetensors=use_safetensors, **options
            )
    except (torch.OutOfMemoryError, UsageError):
        raise
    except Exception as error:  # wrong shapes, a broken file, an architecture that generates no text
        raise UsageError(f"transformers cannot load {path}: {one_line(error)}") from error
    if loading_info["missing_keys"]:
        raise UsageError(
            f"{path} does not fit its config.json: it lacks {', '.join(sorted(loading_info['missing_keys']))}."
        )
    if scales := sorted(name for name in loading_info["unexpected_keys"] if "weight_scale" in name):
        raise UsageError(
            f"{path} holds {scales[0]}, which transformers does not read: it would decode weights without their "
            f"scales. Use --engine sparsecache, or the unquantised checkpoint."
        )
    return (model if "device_map" in options else model.to(devices[0])).eval()


def rope_types(model: Any) -> set[str]:
    """Return the RoPE types of a model's modules, such as "default" or "dynamic"."""
    stated = [getattr(module, "rope_type", None) for module in model.modules()]
    kinds = [kind for each in stated for kind in (each.values() if isinstance(each, dict) else [each])]
    return {kind for kind in kinds if isinstance(kind, str)}


def reset_dynamic_rope(model: Any) -> None:
    """Restore the frequencies of dynamic RoPE, which transformers may keep from an earlier, longer prompt."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.inv_freq = module.original_inv_freq.to(module.inv_freq.device, copy=True)
            module.max_seq_len_cached = module.original_max_seq_len


def _placement(devices: Sequence[torch.device], quantised: bool) -> dict[str, Any]:
    """Return the arguments of from_pretrained that place a model; none for plain weights on one device."""
    if len(devices) == 1:
        return {"device_map": {"": devices[0]}} if quantised else {}
    if importlib.util.find_spec("accelerate") is None:
        raise UsageError(
            "--gpus_per_worker with --engine transformers needs the package accelerate. Install it: pip install "
            "-c constraints.txt -e '.[gguf]'"
        )
    free = {device.index: torch.cuda.mem_get_info(device)[0] for device in devices}
    return {"device_map": "balanced", "max_memory": free}


def _load_gguf(path: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    """Load a GGUF file with dequantised weights, the default before transformers 5.23."""
    try:
        from transformers import GgufConfig
    except ImportError:
        pass
    else:
        options = {**options, "quantization_config": GgufConfig(dequantize=True)}
    with isolated_folder(path) as folder:
        model, loading_info = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, **options)
    return model, loading_info


def _with_default_attention(config: Any) -> Any:
    """Return a copy of a configuration with transformers' default kernels: sdpa, or eager if a model has no sdpa.

    config.json may name a kernel to download from the hub, also for a part of the model.
    """
    config = copy.deepcopy(config)
    pending = [config]
    while pending:
        part = pending.pop()
        if isinstance(part, PreTrainedConfig):
            part._attn_implementation = part._experts_implementation = None
            pending += vars(part).values()
        elif isinstance(part, list | tuple):
            pending += part
        elif isinstance(part, dict):
            pending += part.values()
    return config
