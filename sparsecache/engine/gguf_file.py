"""Read GGUF files: the header, checked against the file's size, and the tensors, one at a time.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The configuration and the tokenizer come from
transformers' GGUF support. The header is parsed here, since a damaged one can keep other readers busy for hours.

In one file because the parser and the reader of tensors share the constants of the format.
"""

import contextlib
import importlib.util
import mmap
import re
import struct
import tempfile
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecache.engine.stored import StoredTensor
from sparsecache.errors import UsageError, one_line
from sparsecache.files import open_regular

_SPLIT_NAME = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_VERSIONS = (2, 3)
_SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_ARRAY = 4096  # elements; longer arrays are the vocabulary, which transformers reads
_MAX_DIMENSIONS = 4  # a ggml tensor has no more
_UNQUANTISED_TYPES = {0: np.float32, 1: np.float16}  # by ggml type
_BLOCK_VALUES = 2**18  # values that a thread dequantises at once; they fit into a core's cache

# The architectures that this project's engine decodes, and llama.cpp's tensor names with transformers' names.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
_TOP_LEVEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor's place in a file. shape: in torch's order. start: byte offset in the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """The header of a GGUF file. metadata: without long arrays and arrays of strings (see `read_header`)."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]
    data_start: int

    @property
    def architecture(self) -> str:
        """Return llama.cpp's name of the architecture."""
        return str(self.metadata["general.architecture"])

    def get(self, key: str) -> Any:
        """Return the value of `ARCHITECTURE.key`; None if the file does not state it."""
        return self.metadata.get(f"{self.architecture}.{key}")

    @property
    def quantization(self) -> str:
        """Return llama.cpp's name of the file's quantisation, such as Q4_K_M."""
        from gguf import LlamaFileType

        try:
            return LlamaFileType(self.metadata["general.file_type"]).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        except (KeyError, ValueError):
            return "unknown"


def check_gguf_packages() -> None:
    """Raise UsageError, with the install command, if packages that GGUF files need are missing."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"GGUF files need the package{'s' * (len(missing) > 1)} {' and '.join(missing)}. "
            f"Install them: pip install -c constraints.txt -e '.[gguf]'"
        )


def read_header(path: Path, whole: Collection[str] = ()) -> GGUFHeader:
    """Read and check the header. Raises UsageError for a split or damaged file, or one of another format.

    whole: fields to read whole; other arrays of strings or of more than 4,096 elements are left out.
    """
    if _SPLIT_NAME.search(path.name):
        raise _split_file_error(path)
    check_gguf_packages()
    try:
        with open_regular(path) as file:
            start = file.read(4)
            if start != b"GGUF":
                raise UsageError(f"{path} is not a GGUF file: it starts with {start!r}, not b'GGUF'.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _Parser(path, data, whole).header()
    except (struct.error, ValueError, OverflowError) as error:  # OSError is left to the command line
        raise UsageError(
            f"{path} is damaged or incomplete ({one_line(error)}). Download it again; scripts/fetch_model.py "
            f"checks what it downloads."
        ) from error
    if header.metadata.get("split.count", 0) not in (0, 1):
        raise _split_file_error(path)
    return header


@contextlib.contextmanager
def isolated_folder(path: Path) -> Iterator[Path]:
    """Yield a folder with only a link to the file, since transformers also reads files beside the one it loads."""
    with tempfile.TemporaryDirectory(prefix="sparsecache-") as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        yield Path(folder)


def open_tensors(header: GGUFHeader) -> dict[str, StoredTensor]:
    """Return the tensors by transformers' names. Raises UsageError for an unsupported architecture or tensor type.

    Reading a tensor dequantises it to float32 with the package gguf. The permuted query and key rows of llama files
    are put into transformers' order.
    """
    if header.architecture not in ARCHITECTURES:
        raise UsageError(
            f"{header.path} holds the GGUF architecture {header.architecture!r}. Supported: {', '.join(ARCHITECTURES)}."
        )
    _check_tensor_types(header)
    data = np.memmap(header.path, mode="r")
    permuted = {"attn_q": header.get("attention.head_count")}
    permuted["attn_k"] = header.get("attention.head_count_kv") or permuted["attn_q"]
    tensors = {}
    for tensor in header.tensors:
        if tensor.name == _ROPE_FACTORS:
            continue  # see `rope_parameters`
        part = tensor.name.split(".")[-2] if header.architecture == "llama" and "." in tensor.name else ""
        read = partial(_read, data, tensor, permuted.get(part))
        tensors[transformers_name(tensor.name)] = StoredTensor(tensor.shape, torch.float32, read)
    return tensors


def _check_tensor_types(header: GGUFHeader) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    for kind in map(GGMLQuantizationType, {tensor.ggml_type for tensor in header.tensors} - _UNQUANTISED_TYPES.keys()):
        try:
            dequantize(np.zeros(GGML_QUANT_SIZES[kind][1], np.uint8), kind)
        except NotImplementedError as error:
            raise UsageError(
                f"{header.path} holds tensors of type {kind.name}, which the package gguf does not dequantise. Use a "
                f"file of another quantisation, such as Q8_0."
            ) from error


def transformers_name(name: str) -> str:
    """Return transformers' name of a dense decoder's tensor; other names are unchanged."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_LEVEL_NAMES:
        return f"{_TOP_LEVEL_NAMES[stem]}.{kind}"
    if (match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)) and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{kind}"
    return name


def rope_parameters(header: GGUFHeader, unscaled: dict[str, Any]) -> dict[str, Any]:
    """Return transformers' rope_parameters of a file; unscaled: the parameters without scaling.

    transformers, up to 5.24 at least, drops both forms of scaling in GGUF: the keys rope.scaling.*, and the tensor
    rope_freqs.weight of Llama 3.1 and later. Raises UsageError for scaling of another kind.
    """
    kind = header.get("rope.scaling.type") or "none"
    factors = next((tensor for tensor in header.tensors if tensor.name == _ROPE_FACTORS), None)
    if factors is not None:
        return {**unscaled, **_llama3_parameters(header, factors, unscaled)}
    if kind == "none":
        return unscaled
    factor = header.get("rope.scaling.factor")
    if kind == "linear" and factor:
        return {**unscaled, "rope_type": "linear", "factor": float(factor)}
    if kind == "yarn" and factor:
        original = header.get("rope.scaling.original_context_length") or header.get("context_length")
        return {
            **unscaled,
            "rope_type": "yarn",
            "factor": float(factor),
            "original_max_position_embeddings": int(original),
        }
    raise UsageError(
        f"{header.path} scales RoPE by {kind!r}, factor {factor!r}. Supported in GGUF: linear and yarn, with a factor."
    )


def _llama3_parameters(header: GGUFHeader, stored: GGUFTensor, unscaled: dict[str, Any]) -> dict[str, Any]:
    """Return the published parameters of Llama 3.1 to 3.3 if they give the stored factors.

    Raises UsageError if they do not.
    """
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factors = _read(np.memmap(header.path, mode="r"), stored, None)
    if bool((factors == 1).all()):
        return {}
    llama3 = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    size = {"hidden_size": 2 * len(factors), "num_attention_heads": 1, "num_key_value_heads": 1}
    base = {"rope_theta": unscaled["rope_theta"]}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**size, rope_parameters={**base, **llama3}), "cpu")
    exponents = torch.arange(0, 2 * len(factors), 2, dtype=torch.float32) / (2 * len(factors))
    frequencies = 1.0 / base["rope_theta"] ** exponents
    if not torch.allclose(frequencies / scaled, factors, rtol=1e-3):
        raise UsageError(
            f"{header.path} holds a rope_freqs.weight that is not that of Llama 3.1 to 3.3. Other frequency "
            f"factors are not supported. Use the checkpoint's safetensors."
        )
    return llama3


def _read(data: Any, tensor: GGUFTensor, heads: int | None) -> Tensor:
    raw, kind = data[tensor.start : tensor.start + tensor.nbytes], tensor.ggml_type
    unquantised = _UNQUANTISED_TYPES.get(kind)
    values = _dequantise(raw, kind) if unquantised is None else np.array(raw.view(unquantised), dtype=np.float32)
    found = torch.from_numpy(values.reshape(tensor.shape))
    if heads:
        rows = found.shape[0] // heads
        return found.reshape(heads, rows // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)
    return found


def _dequantise(raw: Any, ggml_type: int) -> Any:
    """Return the values of quantised bytes as a float32 array, dequantised by as many threads as torch has."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(ggml_type)
    values_per_block, block_nbytes = GGML_QUANT_SIZES[kind]
    values = np.empty(len(raw) // block_nbytes * values_per_block, dtype=np.float32)
    blocks = max(1, _BLOCK_VALUES // values_per_block)

    def dequantise(start: int) -> None:
        part = dequantize(raw[start * block_nbytes : (start + blocks) * block_nbytes], kind)
        values[start * values_per_block :][: len(part)] = part

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(dequantise, range(0, len(raw) // block_nbytes, blocks)))
    return values


def _split_file_error(path: Path) -> UsageError:
    return UsageError(
        f"{path} is one part of a split GGUF file. Join the parts with llama.cpp's gguf-split --merge and pass the "
        f"joined file."
    )


class _Parser:
    """Reads the header field by field. Raises ValueError or struct.error if the file is inconsistent."""

    def __init__(self, path: Path, data: mmap.mmap, whole: Collection[str]):
        self.path, self.data, self.at, self.whole = path, data, 4, whole

    def header(self) -> GGUFHeader:
        version, tensors, fields = self._unpack("IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}; {' and '.join(map(str, _VERSIONS))} are read")
        metadata: dict[str, Any] = {}
        for _ in range(fields):
            key = self._text()
            if key in metadata:
                raise ValueError(f"it states {key} twice")
            (kind,) = self._unpack("I")
            metadata[key] = self._value(kind, key in self.whole)
        if not isinstance(metadata.get("general.architecture"), str):
            raise ValueError("it states no general.architecture")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment!r}")
        table = [self._tensor_info() for _ in range(tensors)]
        start = -(-self.at // alignment) * alignment
        found = tuple(self._tensor(start, *entry) for entry in table)
        if len({tensor.name for tensor in found}) < len(found):
            raise ValueError("it holds two tensors of one name")
        return GGUFHeader(self.path, metadata, found, start)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        (count,) = self._unpack("I")
        if not 1 <= count <= _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {count} dimensions")
        shape = tuple(reversed(self._unpack(f"{count}Q")))
        return name, shape, *self._unpack("IQ")

    def _tensor(self, start: int, name: str, shape: tuple[int, ...], ggml_type: int, offset: int) -> GGUFTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)]
        if shape[-1] % elements:
            raise ValueError(f"tensor {name!r} has rows of {shape[-1]}, not a multiple of {elements}")
        tensor = GGUFTensor(name, shape, ggml_type, start + offset, prod(shape) // elements * nbytes)
        if tensor.start + tensor.nbytes > len(self.data):
            raise ValueError(f"tensor {name!r} ends at byte {tensor.start + tensor.nbytes} of {len(self.data)}")
        return tensor

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def _text(self) -> str:
        (length,) = self._unpack("Q")
        return self._skip(length).decode()

    def _skip(self, length: int) -> bytes:
        if length > len(self.data) - self.at:
            raise ValueError(f"a field of {length} bytes does not fit")
        self.at += length
        return self.data[self.at - length : self.at]

    def _value(self, kind: int, whole: bool) -> Any:
        if kind in _SCALAR_FORMATS:
            return self._unpack(_SCALAR_FORMATS[kind])[0]
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise ValueError(f"a field has the unknown type {kind}")
        element, count = self._unpack("IQ")
        if element in _SCALAR_FORMATS:
            raw = self._skip(count * struct.calcsize(f"<{_SCALAR_FORMATS[element]}"))
            fits = whole or count <= _MAX_ARRAY
            return list(struct.unpack(f"<{count}{_SCALAR_FORMATS[element]}", raw)) if fits else None
        if element != _STRING:
            raise ValueError(f"an array has elements of type {element}")
        if whole:
            return [self._text() for _ in range(count)]
        for _ in range(count):
            self._skip(*self._unpack("Q"))
        return None
