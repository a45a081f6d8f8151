"""Load a checkpoint: its configuration, tokenizer, stop ids, context window, fingerprint and weights.

A checkpoint is a folder in Hugging Face format or a GGUF file. Code from a checkpoint is never run.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sparsecache.engine import model_registry
from sparsecache.engine.config_checks import check_sizes, read_json
from sparsecache.engine.families.base import Architecture
from sparsecache.engine.fp8 import find_unsupported, join_scales
from sparsecache.engine.gguf_file import (
    ARCHITECTURES,
    GGUFHeader,
    isolated_folder,
    open_tensors,
    read_header,
    rope_parameters,
)
from sparsecache.engine.stored import StoredTensor
from sparsecache.engine.tokenization import find_stop_ids, load_tokenizer
from sparsecache.engine.weight_files import find_weight_files
from sparsecache.engine.weight_formats import describe_folder, describe_quantization, describe_tensors
from sparsecache.engine.weights import Weights, check_tensors, load_weights, open_weights
from sparsecache.engine.window import context_window
from sparsecache.errors import UsageError, one_line, short
from sparsecache.files import open_regular

DTYPES: dict[str, torch.dtype] = {
    name: torch.float8_e4m3fn if name == "fp8" else getattr(torch, name) for name in model_registry.DTYPES
}
"""The dtype of a model's projections by its name in --dtype."""
_DESCRIPTION_SUFFIXES = (".json", ".model", ".jinja", ".tiktoken")
_VOCABULARY_FILES = ("merges.txt", "vocab.txt", "vocab.bpe")
_TEMPLATE_FOLDER = "additional_chat_templates"  # tokenizers read it too
_REQUIRED_GGUF_FIELDS = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
}
_SAMPLED_BYTES = 64 * 1024
_SAMPLES = 64


class Checkpoint:
    """A Hugging Face checkpoint folder or a GGUF file, read without running any code from it."""

    def __init__(self, path: Path, allow_pickle: bool = False):
        """Read the configuration only. Raises UsageError for one that transformers does not know."""
        self.path = path
        self._allow_pickle = allow_pickle
        self.gguf: GGUFHeader | None = read_header(path) if path.suffix == ".gguf" else None
        if self.gguf is not None:
            self.config_source = path
            self.config: Any = _gguf_config(self.gguf)
            return
        self.config_source = path / "config.json"
        if not os.path.lexists(self.config_source):
            raise UsageError(f"{path} holds no config.json. {describe_folder(path)}")
        _check_description_files(path)
        self._raw = read_json(self.config_source)
        _check_model_type(self.config_source, self._raw)
        check_sizes(self._raw, str(self.config_source))
        try:
            self.config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            _apply_condensed_rope(self.config)
        except Exception as error:  # transformers checks each field
            raise UsageError(
                f"{self.config_source} describes no model that transformers can build: {one_line(error)}"
            ) from error

    @property
    def model_type(self) -> str:
        """Return the `model_type` of the configuration."""
        return str(self.config.model_type)

    @property
    def window(self) -> int | None:
        """Return the context window in tokens; None if the configuration does not state one."""
        return context_window(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that the configuration states for what is not quantised; bfloat16 if it states none."""
        stated = str(getattr(self.config, "dtype", None) or torch.bfloat16).removeprefix("torch.")
        if stated not in DTYPES:
            raise UsageError(f"{self.config_source} states dtype {stated}. Choose --dtype {', '.join(DTYPES)}.")
        return DTYPES[stated]

    @property
    def is_fp8(self) -> bool:
        """Return whether the checkpoint stores its projections in fp8, and this project's engine reads them."""
        return self.gguf is None and find_unsupported(self._raw.get("quantization_config")) is None

    @cached_property
    def tokenizer(self) -> Any:
        """Return the tokenizer. Raises UsageError if it cannot be loaded."""
        return load_tokenizer(self.path)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Return the token ids that end generation (tokenization.find_stop_ids)."""
        return find_stop_ids(self.path, self.config, self.tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        """Return a SHA-256 over the configuration, the tokenizer, the chat templates and the weights.

        Of a file over 4 MiB only the size and 65 evenly spaced blocks of 64 KiB are read, since hashing a large
        checkpoint would take a minute at each start. A small change between two blocks is not detected. The header of a
        GGUF file, which holds its configuration and tokenizer, is read in full.
        """
        digest = hashlib.sha256()
        if self.gguf is not None:
            digest.update(_sampled_digest(self.path, whole=self.gguf.data_start))
            return digest.hexdigest()
        weights = {path.name for path in self._weight_files()}
        for path in [*sorted(self.path.iterdir()), *sorted((self.path / _TEMPLATE_FOLDER).glob("*.jinja"))]:
            if (path.name in weights or _is_description(path)) and path.is_file():
                digest.update(f"{path.relative_to(self.path)}\0{path.stat().st_size}\0".encode())
                digest.update(_sampled_digest(path))
        return digest.hexdigest()

    def check_format(self, engine: str) -> None:
        """Raise UsageError, naming the format, for weights that an engine cannot decode, such as quantised ones.

        Reads the configuration and file names only. engine: "sparsecache" or "transformers".
        """
        if self.gguf is not None:
            return
        if os.path.lexists(self.path / "adapter_config.json"):
            raise UsageError(describe_folder(self.path))
        if problem := describe_quantization(self.path, self._raw, engine):
            raise UsageError(problem)

    def check_vocabulary(self) -> None:
        """Raise UsageError if the tokenizer has token ids beyond the rows of the embedding."""
        rows = getattr(self.config.get_text_config(), "vocab_size", None)
        beyond = sorted((at, token) for token, at in self.tokenizer.get_vocab().items() if rows and at >= rows)
        if beyond:
            few = ", ".join(f"{token!r} ({at})" for at, token in beyond[:5])
            more = f" and {len(beyond) - 5} more" if len(beyond) > 5 else ""
            raise UsageError(
                f"{self.path} has an embedding of {rows} rows, but its tokenizer gives ids beyond it: {few}{more}. "
                f"Resize the embedding (resize_token_embeddings) or remove these tokens from the tokenizer's files."
            )

    def check_weights(self, architecture: Architecture | None) -> None:
        """Compare names, shapes and dtypes of the stored tensors with the configuration; read no values.

        architecture: None for transformers' engine, which checks names itself. Raises UsageError if they differ.
        """
        if architecture is None and self.gguf is not None:
            return
        if architecture is not None:
            check_tensors(self.path, architecture, self._open_for_decoder())
            return
        tensors = self._open()
        stored = {int(part) for name in tensors for part in name.split(".") if part.isdecimal()}
        layers = getattr(self.config.get_text_config(), "num_hidden_layers", 0)
        if stored and type(layers) is int and layers > max(stored) + 1:
            raise UsageError(
                f"{self.config_source} states num_hidden_layers = {layers}; the weights hold {max(stored) + 1} layers."
            )
        plain = not getattr(self.config, "quantization_config", None)
        bytes_only = {name for name, tensor in tensors.items() if tensor.dtype.itemsize == 1 and tensor.shape}
        if plain and (problem := describe_tensors(self.path, tensors, bytes_only)):
            raise UsageError(problem)

    def load(
        self, architecture: Architecture, device: torch.device | Sequence[torch.device], dtype: torch.dtype
    ) -> Weights:
        """Load all weights to a device, or the layers to several devices in equal parts.

        dtype: float8_e4m3fn for projections in fp8, which are quantised one after the other on the device. A checkpoint
        in fp8 is dequantised for any other dtype. Raises UsageError for a tensor that is missing, unexpected, quantised
        in another way or of the wrong shape.
        """
        self.check_format("sparsecache")
        devices = [device] if isinstance(device, torch.device) else device
        return load_weights(self.path, self._open_for_decoder(), architecture, devices, dtype)

    def _open_for_decoder(self) -> dict[str, StoredTensor]:
        tensors = self._open()
        return join_scales(self.path, tensors) if self.is_fp8 else tensors

    def _open(self) -> dict[str, StoredTensor]:
        if self.gguf is not None:
            return open_tensors(self.gguf)
        return open_weights(self._weight_files())

    def _weight_files(self) -> list[Path]:
        return find_weight_files(self.path, self._allow_pickle)


def _is_description(path: Path) -> bool:
    return path.name in _VOCABULARY_FILES or path.suffix in _DESCRIPTION_SUFFIXES


def _check_description_files(folder: Path) -> None:
    """Raise UsageError for a broken link, a pipe or a folder in place of a file, which transformers would ignore."""
    for path in sorted(folder.iterdir()):
        if _is_description(path) and not path.is_file():
            raise UsageError(
                f"{path} is not a regular file, nor a link to one. Download it again, or remove it if the checkpoint "
                f"does not need it."
            )


def _check_model_type(source: Path, raw: dict[str, Any]) -> None:
    model_type = raw.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        return
    if raw.get("auto_map"):
        raise UsageError(
            f"{source} says model_type {model_type!r}, which needs code from the checkpoint. Such models are not "
            f"supported: code from a checkpoint is never run here."
        )
    raise UsageError(
        f"{source} says model_type {model_type!r}, which transformers {transformers.__version__} does not know. "
        f"Use a checkpoint of another type, or a transformers that knows it."
    )


def _gguf_config(header: GGUFHeader) -> Any:
    """Return transformers' configuration of a GGUF file, with the RoPE scaling that transformers drops."""
    prefix = f"{header.architecture}."
    own = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    if header.architecture in ARCHITECTURES:
        _check_gguf_fields(header, prefix, own)
    check_sizes(own, str(header.path))
    try:
        with isolated_folder(header.path) as folder:
            config = AutoConfig.from_pretrained(folder, gguf_file=header.path.name)
    except Exception as error:  # an unknown architecture, or a missing or wrong field
        from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

        raise UsageError(
            f"{header.path} holds the GGUF architecture {header.architecture!r}, which transformers "
            f"{transformers.__version__} cannot configure ({one_line(error)}). Supported architectures: "
            f"{', '.join(sorted({*GGUF_SUPPORTED_ARCHITECTURES} - {'general', 'tokenizer'}))}."
        ) from error
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type", "default") == "default" and "rope_theta" in rope:
        config.rope_parameters = rope_parameters(header, rope)
    if (end_of_turn := header.metadata.get("tokenizer.ggml.eot_token_id")) is not None:
        stated = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        config.eos_token_id = [*(token for token in stated if token not in (None, end_of_turn)), end_of_turn]
    return config


def _check_gguf_fields(header: GGUFHeader, prefix: str, own: dict[str, Any]) -> None:
    """Raise UsageError for a missing field, for which transformers would use a default, or one that is no number."""
    if missing := sorted(_REQUIRED_GGUF_FIELDS - own.keys()):
        raise UsageError(f"{header.path} does not state {prefix}{f', {prefix}'.join(missing)}. Download it again.")
    for field in sorted({*_REQUIRED_GGUF_FIELDS, "attention.head_count_kv"} & own.keys()):
        if type(own[field]) not in (int, float):
            raise UsageError(f"{header.path} states {prefix}{field} = {short(own[field])}. It must be a number.")


def _apply_condensed_rope(config: Any) -> None:
    """Apply `rope_condense_ratio`, LongChat's name for linear RoPE scaling, which transformers ignores."""
    ratio = getattr(config, "rope_condense_ratio", None)
    if ratio and config.rope_parameters.get("rope_type", "default") == "default":
        config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": float(ratio)}


def _sampled_digest(path: Path, whole: int = 0) -> bytes:
    """Return a SHA-256 of a file, sampled if it is large; its first `whole` bytes are read in full."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _SAMPLES * _SAMPLED_BYTES:
            return hashlib.sha256(file.read()).digest()
        digest.update(file.read(whole))
        for index in range(_SAMPLES + 1):
            file.seek((size - _SAMPLED_BYTES) * index // _SAMPLES)
            digest.update(file.read(_SAMPLED_BYTES))
        return digest.digest()
