"""A checkpoint folder: its configuration, tokenizer, stop ids, fingerprint, and strictly loaded weights."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from sparsecache.engine.families.base import Architecture
from sparsecache.errors import UsageError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>")
_HEAD = "lm_head.weight"
_VOCABULARY = {"merges.txt", "vocab.txt"}
_SAMPLED_BYTES = 64 * 1024
_SAMPLES = 64


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
    """All weights of a model, on one device, in one dtype."""

    embedding: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    head: Tensor


class Checkpoint:
    """A Hugging Face checkpoint folder, read without running any code from it."""

    def __init__(self, path: Path, allow_pickle: bool = False):
        """Reads the configuration only. Raises UsageError for one that transformers does not know."""
        self.path = path
        self._allow_pickle = allow_pickle
        try:
            self.config: Any = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # unknown, unreadable, or refused by transformers' own checks of each field
            raise UsageError(
                f"{path / 'config.json'} is no configuration that transformers knows without running code from the "
                f"checkpoint, which is never done here: {_one_line(error)}"
            ) from error

    @property
    def model_type(self) -> str:
        """The `model_type` of config.json."""
        return str(self.config.model_type)

    @property
    def window(self) -> int | None:
        """Tokens the checkpoint is made for (`max_position_embeddings`); None if config.json does not say."""
        stated = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return None if stated is None else int(stated)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that config.json states; bfloat16 if it states none."""
        stated = getattr(self.config, "dtype", None) or torch.bfloat16
        return stated if isinstance(stated, torch.dtype) else DTYPES[str(stated).removeprefix("torch.")]

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer. Raises UsageError if transformers cannot make one of the folder."""
        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:  # whatever a broken tokenizer file raises
            raise UsageError(f"{self.path} holds no tokenizer that can be loaded: {_one_line(error)}") from error

    @cached_property
    def stop_ids(self) -> list[int]:
        """Token ids that end a turn: generation_config's eos, the tokenizer's eos, <|eot_id|> and <|im_end|>."""
        if (self.path / "generation_config.json").is_file():
            stated = self._generation_config().eos_token_id
        else:  # transformers takes config.json's then
            stated = self.config.get_text_config().eos_token_id
        ids = set(stated if isinstance(stated, list) else [stated]) | {self.tokenizer.eos_token_id}
        vocabulary = self.tokenizer.get_vocab()
        ids |= {vocabulary[token] for token in _TURN_ENDS if token in vocabulary}
        return sorted(int(stop_id) for stop_id in ids if stop_id is not None)

    def _generation_config(self) -> Any:
        try:
            return GenerationConfig.from_pretrained(self.path)
        except Exception as error:  # broken JSON, or values that transformers refuses
            raise UsageError(f"{self.path / 'generation_config.json'} cannot be read: {_one_line(error)}") from error

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the configuration, the tokenizer and the weights.

        Of a weight file over 4 MiB the size, the first block (its table of tensors) and 64 blocks spread
        evenly are read, so that large checkpoints do not cost a minute each start.
        """
        digest = hashlib.sha256()
        weights = {path.name for path in self._weight_files()}
        for path in sorted(self.path.iterdir()):
            if path.name in weights | _VOCABULARY or path.suffix in (".json", ".model", ".jinja"):
                digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
                digest.update(_sampled(path))
        return digest.hexdigest()

    def load(self, architecture: Architecture, device: torch.device, dtype: torch.dtype) -> Weights:
        """All weights on the device. Raises UsageError for a tensor that is missing, unexpected or misshapen."""
        tensors = self._open()
        _check_strictly(self.path, architecture, {name: tensor.shape for name, tensor in tensors.items()})

        def take(*names: str) -> Tensor:
            parts = [tensors[name].read().to(device, dtype) for name in names]
            return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)

        def take_if(present: bool, *names: str) -> Tensor | None:
            return take(*names) if present else None

        embedding = take("model.embed_tokens.weight")
        head = take(_HEAD) if _HEAD in tensors else embedding
        if architecture.tied and torch.equal(head, embedding):  # one copy is enough
            head = embedding
        return Weights(
            embedding=embedding,
            layers=[
                _layer(f"model.layers.{i}.", architecture, take, take_if) for i in range(architecture.shape.layers)
            ],
            norm=take("model.norm.weight"),
            head=head,
        )

    def _weight_files(self) -> list[Path]:
        """The files that hold the weights; pickles only where they are allowed. Raises UsageError without any."""
        for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
            index = self.path / f"{stem}.{ending}.index.json"
            single = self.path / f"{stem}.{ending}"
            if index.is_file():
                names = _shards(index)
                missing = [name for name in names if not (self.path / name).is_file()]
                if missing and (ending != "bin" or self._allow_pickle):
                    raise UsageError(f"{self.path} lacks {', '.join(missing)}, named in {index.name}. Fetch it again.")
                files = [self.path / name for name in names]
            elif single.is_file():
                files = [single]
            else:
                continue
            if ending == "bin" and not self._allow_pickle:
                raise UsageError(
                    f"{self.path} holds its weights as pickle files ({single.name}) only. Convert them to "
                    f"safetensors, or pass --allow_pickle if you trust where they come from."
                )
            return files
        raise UsageError(f"{self.path} holds no weights: neither model.safetensors nor an index of shards.")

    def _open(self) -> "dict[str, _Stored]":
        tensors: dict[str, _Stored] = {}
        for path in self._weight_files():
            try:
                tensors.update(_open_pickle(path) if path.suffix == ".bin" else _open_safetensors(path))
            except Exception as error:  # a truncated or foreign file
                raise UsageError(f"{path} cannot be read ({_one_line(error)}). Fetch it again.") from error
        return tensors


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file: its shape now, its data when asked for."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index} is no index of shards ({_one_line(error)}). Fetch it again.") from error


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


def _layer(
    prefix: str, architecture: Architecture, take: Callable[..., Tensor], take_if: Callable[..., Tensor | None]
) -> LayerWeights:
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    qkv = [f"{attention}{name}_proj" for name in "qkv"]
    gate_up = [f"{mlp}gate_proj", f"{mlp}up_proj"]
    return LayerWeights(
        input_norm=take(f"{prefix}input_layernorm.weight"),
        qkv=take(*(f"{name}.weight" for name in qkv)),
        qkv_bias=take_if(architecture.qkv_bias, *(f"{name}.bias" for name in qkv)),
        q_norm=take_if(architecture.qk_norm, f"{attention}q_norm.weight"),
        k_norm=take_if(architecture.qk_norm, f"{attention}k_norm.weight"),
        output=take(f"{attention}o_proj.weight"),
        output_bias=take_if(architecture.output_bias, f"{attention}o_proj.bias"),
        mlp_norm=take(f"{prefix}post_attention_layernorm.weight"),
        gate_up=take(*(f"{name}.weight" for name in gate_up)),
        gate_up_bias=take_if(architecture.mlp_bias, *(f"{name}.bias" for name in gate_up)),
        down=take(f"{mlp}down_proj.weight"),
        down_bias=take_if(architecture.mlp_bias, f"{mlp}down_proj.bias"),
    )


def _sampled(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _SAMPLES * _SAMPLED_BYTES:
            return hashlib.sha256(file.read()).digest()
        digest = hashlib.sha256()
        for index in range(_SAMPLES + 1):
            file.seek((size - _SAMPLED_BYTES) * index // _SAMPLES)
            digest.update(file.read(_SAMPLED_BYTES))
        return digest.digest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
