"""Read the weights of a model from a checkpoint's files, checked against its architecture, to the device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparsecache.engine.families.base import Architecture
from sparsecache.engine.fp8 import COMPUTE_DTYPE, concat_fp8
from sparsecache.engine.stored import StoredTensor
from sparsecache.engine.weight_formats import describe_tensors
from sparsecache.errors import UsageError, one_line
from sparsecache.files import open_regular
from sparsecache.kernels.fp8 import FP8, Fp8Matrix, Matrix

_HEAD = "lm_head.weight"
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class LayerWeights:
    """The weights of a layer. Projections of the same input are one matrix: rows of q, k, v, and of gate, up."""

    input_norm: Tensor
    qkv: Matrix
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Matrix
    output_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Matrix
    gate_up_bias: Tensor | None
    down: Matrix
    down_bias: Tensor | None


@dataclass(frozen=True)
class Weights:
    """All weights of a model in one dtype: on one device, or split by layers over several.

    In fp8 the layers' projections are Fp8Matrix, and all others are in bfloat16: a step reads one row of the embedding,
    and the head decides between tokens that are nearly tied. The embedding is on the first layer's device, the final
    norm and the head are on the last layer's.
    """

    embedding: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    head: Tensor


def open_weights(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Return the tensors of all files by name, without reading values.

    Raises UsageError for a file that cannot be read, and for a tensor that is in two files.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        try:
            found = _open_pickle(path) if path.suffix == ".bin" else _open_safetensors(path)
        except UsageError:
            raise
        except Exception as error:  # a truncated file, or one of another format
            raise UsageError(f"{path} cannot be read ({one_line(error)}). Download it again.") from error
        if duplicates := sorted(tensors.keys() & found.keys()):
            raise UsageError(
                f"{path} holds {duplicates[0]}, which another shard also holds. Download the checkpoint again."
            )
        tensors.update(found)
    return tensors


def load_weights(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    architecture: Architecture,
    devices: Sequence[torch.device],
    dtype: torch.dtype,
) -> Weights:
    """Load all weights, with the layers split over the devices in equal parts, in order.

    path: the checkpoint, for errors. dtype: float8_e4m3fn for projections in fp8. Raises UsageError for a tensor that
    is missing, unexpected, quantised or of the wrong shape, before any values are read.
    """
    check_tensors(path, architecture, tensors)
    has_head = _HEAD in tensors
    return _Reader(lambda name: tensors[name].read(), has_head, architecture, devices, dtype).weights()


def read_weights(
    read: Callable[[str], Matrix], architecture: Architecture, devices: Sequence[torch.device], dtype: torch.dtype
) -> Weights:
    """Load all weights with a function; read: returns a tensor of `architecture.tensors()` by name."""
    return _Reader(read, not architecture.tied, architecture, devices, dtype).weights()


class _Reader:
    """Reads tensors by name, and concatenates projections of the same input."""

    def __init__(
        self,
        read: Callable[[str], Matrix],
        has_head: bool,
        architecture: Architecture,
        devices: Sequence[torch.device],
        dtype: torch.dtype,
    ):
        self._read, self._has_head, self._architecture = read, has_head, architecture
        self._devices, self._in_fp8 = devices, dtype == FP8
        self._dtype = COMPUTE_DTYPE if self._in_fp8 else dtype
        self._device = devices[0]  # device of the layer that is being read

    def weights(self) -> Weights:
        embedding = self._take("model.embed_tokens.weight")
        layers = [self._layer(index) for index in range(self._architecture.shape.layers)]
        head = self._take(_HEAD) if self._has_head else embedding.to(self._device)  # the last layer's
        if self._architecture.tied and head.device == embedding.device and torch.equal(head, embedding):
            head = embedding  # one copy is enough
        return Weights(embedding, layers, self._take("model.norm.weight"), head)

    def _layer(self, index: int) -> LayerWeights:
        prefix = f"model.layers.{index}."
        self._device = self._devices[index * len(self._devices) // self._architecture.shape.layers]
        architecture = self._architecture
        qkv = [f"{prefix}self_attn.{name}_proj" for name in "qkv"]
        output, down = f"{prefix}self_attn.o_proj", f"{prefix}mlp.down_proj"
        gate_up = [f"{prefix}mlp.{name}_proj" for name in ("gate", "up")]
        return LayerWeights(
            input_norm=self._take(f"{prefix}input_layernorm.weight"),
            qkv=self._matrix(*(f"{name}.weight" for name in qkv)),
            qkv_bias=self._take_if(architecture.qkv_bias, *(f"{name}.bias" for name in qkv)),
            q_norm=self._take_if(architecture.qk_norm, f"{prefix}self_attn.q_norm.weight"),
            k_norm=self._take_if(architecture.qk_norm, f"{prefix}self_attn.k_norm.weight"),
            output=self._matrix(f"{output}.weight"),
            output_bias=self._take_if(architecture.output_bias, f"{output}.bias"),
            mlp_norm=self._take(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self._matrix(*(f"{name}.weight" for name in gate_up)),
            gate_up_bias=self._take_if(architecture.mlp_bias, *(f"{name}.bias" for name in gate_up)),
            down=self._matrix(f"{down}.weight"),
            down_bias=self._take_if(architecture.mlp_bias, f"{down}.bias"),
        )

    def _matrix(self, *names: str) -> Matrix:
        if not self._in_fp8:
            return self._take(*names)
        return concat_fp8([self._read(name).to(self._device) for name in names])

    def _take(self, *names: str) -> Tensor:
        parts = [self._read_dense(name) for name in names]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)

    def _read_dense(self, name: str) -> Tensor:
        stored = self._read(name)
        if isinstance(stored, Fp8Matrix):
            return stored.to(self._device).dequantise(self._dtype)
        return stored.to(self._device, self._dtype)

    def _take_if(self, present: bool, *names: str) -> Tensor | None:
        return self._take(*names) if present else None


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    with open_regular(path):  # safetensors would block on a named pipe
        file: Any = safe_open(path, framework="pt")
    slices = {name: file.get_slice(name) for name in list(file.keys())}
    return {
        name: StoredTensor(tuple(part.get_shape()), _dtype(part.get_dtype()), partial(file.get_tensor, name))
        for name, part in slices.items()
    }


def _dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype; uint8 for others, which are refused as quantised."""
    return _SAFETENSORS_DTYPES.get(name, torch.uint8)


def _open_pickle(path: Path) -> dict[str, StoredTensor]:
    with open_regular(path):
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(loaded, Mapping):
        raise UsageError(f"{path} holds a {type(loaded).__name__}, not tensors by name. Save the model's state_dict().")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise UsageError(
                f"{path} holds {type(tensor).__name__} {str(name)[:80]!r} instead of a dense tensor. Save the "
                f"model's state_dict()."
            )
        if tensor.is_meta or tensor.is_quantized or tensor.is_nested:
            raise UsageError(f"{path} holds {name[:80]!r} as a tensor without plain values. Use the original weights.")
    return {
        name: StoredTensor(tuple(t.shape), t.dtype, partial(loaded.__getitem__, name)) for name, t in loaded.items()
    }


def check_tensors(path: Path, architecture: Architecture, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise UsageError if names, shapes or dtypes differ from those of the architecture."""
    expected = architecture.tensors()
    ignored = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}  # a buffer of old Llama files
    if architecture.tied and _HEAD in tensors:  # used as stored, as transformers does when it differs
        expected[_HEAD] = expected["model.embed_tokens.weight"]
    known = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    if problem := describe_tensors(path, known, expected):
        raise UsageError(problem)
    problems = [f"lacks {name}" for name in expected.keys() - tensors.keys()]
    problems += [f"holds unexpected {name}" for name in known.keys() - expected.keys()]
    problems += [
        f"holds {name} of shape {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} further differences" if len(problems) > 5 else ""
        raise UsageError(f"{path} does not fit its configuration: it {'; it '.join(sorted(problems)[:5])}{more}.")
