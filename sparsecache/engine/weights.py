"""The weights of a model in memory, and how they are read from a checkpoint's files: strictly, and on the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparsecache.engine.families.base import Architecture
from sparsecache.errors import UsageError, one_line

_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class LayerWeights:
    """One layer: projections that read the same input are one matrix (rows: q, k, v; gate, up)."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True)
class Weights:
    """All weights of a model in one dtype: on one device, or split by layers over several.

    The embedding lies with the first layer, norm and head with the last.
    """

    embedding: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    head: Tensor


def load_weights(
    files: list[Path], architecture: Architecture, devices: Sequence[torch.device], dtype: torch.dtype
) -> Weights:
    """All weights, the layers in equal parts on the devices, in order.

    Raises UsageError for a file that cannot be read, and for a tensor that is missing, unexpected or misshapen,
    before any data is read.
    """
    tensors: dict[str, _Stored] = {}
    for path in files:
        try:
            tensors.update(_open_pickle(path) if path.suffix == ".bin" else _open_safetensors(path))
        except Exception as error:  # a truncated or foreign file
            raise UsageError(f"{path} cannot be read ({one_line(error)}). Fetch it again.") from error
    _check_strictly(files[0].parent, architecture, {name: tensor.shape for name, tensor in tensors.items()})
    own_head = _HEAD in tensors
    return _Reader(lambda name: tensors[name].read(), own_head, architecture, devices, dtype).weights()


def read_weights(
    read: Callable[[str], Tensor], architecture: Architecture, devices: Sequence[torch.device], dtype: torch.dtype
) -> Weights:
    """The same, `read` by the names of `architecture.tensors()`, each once."""
    return _Reader(read, not architecture.tied, architecture, devices, dtype).weights()


class _Reader:
    """Reads tensors by name, fusing those that are used together."""

    def __init__(
        self,
        read: Callable[[str], Tensor],
        own_head: bool,
        architecture: Architecture,
        devices: Sequence[torch.device],
        dtype: torch.dtype,
    ):
        self._read, self._own_head, self._architecture = read, own_head, architecture
        self._devices, self._dtype = devices, dtype
        self._device = devices[0]  # where what is being read goes

    def weights(self) -> Weights:
        embedding = self._take("model.embed_tokens.weight")
        layers = [self._layer(index) for index in range(self._architecture.shape.layers)]
        head = self._take(_HEAD) if self._own_head else embedding.to(self._device)  # that of the last layer
        if self._architecture.tied and head.device == embedding.device and torch.equal(head, embedding):
            head = embedding  # one copy is enough
        return Weights(embedding, layers, self._take("model.norm.weight"), head)

    def _layer(self, index: int) -> LayerWeights:
        prefix = f"model.layers.{index}."
        self._device = self._devices[index * len(self._devices) // self._architecture.shape.layers]
        has = self._architecture
        qkv = [f"{prefix}self_attn.{name}_proj" for name in "qkv"]
        output, down = f"{prefix}self_attn.o_proj", f"{prefix}mlp.down_proj"
        gate_up = [f"{prefix}mlp.{name}_proj" for name in ("gate", "up")]
        return LayerWeights(
            input_norm=self._take(f"{prefix}input_layernorm.weight"),
            qkv=self._take(*(f"{name}.weight" for name in qkv)),
            qkv_bias=self._take_if(has.qkv_bias, *(f"{name}.bias" for name in qkv)),
            q_norm=self._take_if(has.qk_norm, f"{prefix}self_attn.q_norm.weight"),
            k_norm=self._take_if(has.qk_norm, f"{prefix}self_attn.k_norm.weight"),
            output=self._take(f"{output}.weight"),
            output_bias=self._take_if(has.output_bias, f"{output}.bias"),
            mlp_norm=self._take(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self._take(*(f"{name}.weight" for name in gate_up)),
            gate_up_bias=self._take_if(has.mlp_bias, *(f"{name}.bias" for name in gate_up)),
            down=self._take(f"{down}.weight"),
            down_bias=self._take_if(has.mlp_bias, f"{down}.bias"),
        )

    def _take(self, *names: str) -> Tensor:
        parts = [self._read(name).to(self._device, self._dtype) for name in names]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)

    def _take_if(self, present: bool, *names: str) -> Tensor | None:
        return self._take(*names) if present else None


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file: its shape now, its data when asked for."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def _open_safetensors(path: Path) -> dict[str, _Stored]:
    file: Any = safe_open(path, framework="pt")
    return {
        name: _Stored(tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name))
        for name in list(file.keys())
    }


def _open_pickle(path: Path) -> dict[str, _Stored]:
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {name: _Stored(tuple(tensor.shape), partial(loaded.get, name)) for name, tensor in loaded.items()}


def _check_strictly(path: Path, architecture: Architecture, shapes: dict[str, tuple[int, ...]]) -> None:
    expected = architecture.tensors()
    ignored = {name for name in shapes if name.endswith("rotary_emb.inv_freq")}  # a buffer of old Llama files
    if architecture.tied and _HEAD in shapes:  # used as stored, as transformers does when it differs
        expected[_HEAD] = expected["model.embed_tokens.weight"]
    problems = [f"lacks {name}" for name in expected.keys() - shapes.keys()]
    problems += [f"holds unexpected {name}" for name in shapes.keys() - expected.keys() - ignored]
    problems += [
        f"holds {name} of shape {list(shapes[name])} where config.json asks for {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} further differences" if len(problems) > 5 else ""
        raise UsageError(f"{path} does not fit its config.json: it {'; it '.join(sorted(problems)[:5])}{more}.")
