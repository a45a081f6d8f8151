"""Decoding in fp8: the devices that can, and checkpoints that store fp8 weights.

Checkpoints hold weights in e4m3 with one scale per tensor or per output row, and quantise activations as they come:
compressed-tensors' `float-quantized`, and `quant_method: fp8`. Weights are used as stored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsecache.engine.stored import StoredTensor
from sparsecache.errors import UsageError, short
from sparsecache.kernels.fp8 import FP8, Fp8Matrix, quantise

COMPUTE_DTYPE = torch.bfloat16
"""The dtype of everything but the projections: embedding, head, norms, attention, residual, and keys and values."""
_MIN_CAPABILITY = (8, 9)  # of Ada, the first GPUs with fp8
_SCALE = "_scale"  # after the name of a weight


def check_fp8_devices(devices: Sequence[torch.device]) -> None:
    """Raise UsageError, naming the device, if one of them cannot multiply in fp8."""
    for device in devices:
        if device.type != "cuda":
            found = f"{device} is not a GPU"
        elif torch.version.hip is not None:
            found = f"{torch.cuda.get_device_name(device)} is not from NVIDIA"
        elif (capability := torch.cuda.get_device_capability(device)) < _MIN_CAPABILITY:
            found = f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
        else:
            continue
        raise UsageError(
            f"--dtype fp8 needs an NVIDIA GPU of compute capability 8.9 or later, and {found}. Use --dtype "
            f"{'float32' if device.type == 'cpu' else 'bfloat16'}."
        )


def find_unsupported(settings: Any) -> str | None:
    """Return why a checkpoint's quantization_config is not supported as fp8, as a clause; None if it is."""
    if not isinstance(settings, Mapping):
        return "it states no settings"
    method = settings.get("quant_method")
    if method == "compressed-tensors":
        return _find_unsupported_compressed(settings)
    if method != "fp8":
        return "it is not fp8"
    if settings.get("weight_block_size") is not None:
        return "its weights have a scale per block"
    if (scheme := settings.get("activation_scheme", "dynamic")) != "dynamic":
        return f"its activations have {short(scheme)} scales"
    return None


def _find_unsupported_compressed(settings: Mapping[str, Any]) -> str | None:
    if settings.get("format") != "float-quantized":
        return f"its format is {short(settings.get('format'))}, not float-quantized"
    if settings.get("kv_cache_scheme") is not None:
        return "its keys and values have scales"
    if settings.get("transform_config"):
        return "its weights and activations are rotated"
    sparsity = settings.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"):
        return "its weights are stored as sparse"
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return "it has no config_groups"
    for group in groups.values():
        stated = group if isinstance(group, Mapping) else {}
        weights, inputs = stated.get("weights"), stated.get("input_activations")
        if not isinstance(weights, Mapping) or not isinstance(inputs, Mapping):
            return "its weights or its activations are not quantised"
        if stated.get("output_activations") is not None:
            return "its outputs are quantised"
        for part in (weights, inputs):
            if part.get("type") != "float" or part.get("num_bits") != 8 or not part.get("symmetric", True):
                return "it is not symmetric fp8"
        if weights.get("strategy") not in ("channel", "tensor") or weights.get("dynamic"):
            return f"its weights have scales by {short(weights.get('strategy'))}, not by channel or tensor"
        if inputs.get("dynamic") is not True:
            return "its activations have static scales"
        if (strategy := inputs.get("strategy", "token")) != "token":
            return f"its activations have scales by {short(strategy)}, not by token"
    return None


def join_scales(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return a checkpoint's tensors with each weight in e4m3 and its scale as one tensor, read as an Fp8Matrix.

    path: the checkpoint, for errors. Raises UsageError for a weight without a scale or with one of another shape.
    """
    joined = dict(tensors)
    for name, stored in tensors.items():
        if stored.dtype != FP8:
            continue
        scale = joined.pop(f"{name}{_SCALE}", None)
        rows = stored.shape[0] if stored.shape else 0
        if f"{name}{_SCALE}_inv" in tensors:
            raise UsageError(
                f"{path} holds {name}{_SCALE}_inv: scales per block, which are not read. Use --engine transformers."
            )
        if scale is None:
            raise UsageError(f"{path} holds {name} in fp8 without {name}{_SCALE}. Download it again.")
        if len(stored.shape) != 2 or scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
            raise UsageError(
                f"{path} holds {name}{_SCALE} of shape {list(scale.shape)} for a weight of {list(stored.shape)}. One "
                f"scale per tensor or per row is read. Use --engine transformers."
            )
        if not scale.dtype.is_floating_point:
            raise UsageError(f"{path} holds {name}{_SCALE} as {scale.dtype}, not as numbers. Download it again.")
        joined[name] = StoredTensor(stored.shape, COMPUTE_DTYPE, _Reader(stored, scale, f"{path} holds {name}{_SCALE}"))
    return joined


class _Reader:
    """Reads a weight and its scale. Raises UsageError for a scale that is not a number above 0."""

    def __init__(self, weight: StoredTensor, scale: StoredTensor, what: str):
        self._weight, self._scale, self._what = weight, scale, what

    def __call__(self) -> Fp8Matrix:
        values, scale = self._weight.read(), self._scale.read()
        assert isinstance(values, Tensor) and isinstance(scale, Tensor)
        scale = scale.float().flatten()
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise UsageError(f"{self._what} with numbers that are not finite and above 0. Download it again.")
        return Fp8Matrix(values, scale.expand(len(values)).contiguous(), COMPUTE_DTYPE)


def concat_fp8(parts: Sequence[Tensor | Fp8Matrix]) -> Fp8Matrix:
    """Return the rows of all parts [M_i, K] as one matrix; parts that are not in fp8 are quantised."""
    each = [part if isinstance(part, Fp8Matrix) else quantise(part) for part in parts]
    if len(each) == 1:
        return replace(each[0], dtype=COMPUTE_DTYPE)
    values = torch.cat([part.values.view(torch.uint8) for part in each]).view(FP8)
    return Fp8Matrix(values, torch.cat([part.scales for part in each]), COMPUTE_DTYPE)
