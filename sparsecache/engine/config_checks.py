"""Read a checkpoint's config.json as plain JSON, and check its numbers before transformers reads them.

transformers loops over sizes and allocates memory by them. An impossible size is therefore refused first.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsecache.errors import UsageError, one_line
from sparsecache.files import read_file

_MAX_BYTES = 16 * 2**20  # the largest known config.json has 0.1 MiB

# Largest value per field: far above any checkpoint, and far below what takes a minute or a gigabyte.
_LAYERS, _WIDTH, _HEADS, _TOKENS = 4096, 2**20, 2**14, 2**26
_MAX_VALUES = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "block_count"), _LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_length"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "feed_forward_length"), 4 * _WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention.head_count"), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "attention.head_count_kv"), _HEADS),
    **dict.fromkeys(("head_dim", "attention.key_length", "attention.value_length", "rope.dimension_count"), _HEADS),
    **dict.fromkeys(("vocab_size",), _TOKENS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "context_length"), 2**31),
    "original_max_position_embeddings": 2**31,
    "rope.scaling.original_context_length": 2**31,
}
_POSITIVE_FIELDS = {
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "rope_theta", "rope_condense_ratio",
    "factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "short_factor",
    "long_factor", "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor",
}  # fmt: skip
_HEAD_FIELDS = (
    ("num_attention_heads", "num_key_value_heads"),
    ("attention.head_count", "attention.head_count_kv"),  # GGUF
)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UsageError for a file that is missing, too large, invalid or not an object."""
    try:
        value = json.loads(read_file(path, _MAX_BYTES))
    except (ValueError, RecursionError) as error:  # invalid, not UTF-8, nested too deep, numbers of 5,000 digits
        raise UsageError(f"{path} is not valid JSON ({one_line(error)}). Download it again.") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds {type(value).__name__} instead of a JSON object. Download it again.")
    return value


def check_sizes(config: Mapping[str, Any], source: str) -> None:
    """Raise UsageError for a size or a constant that no model can have.

    config: a config.json, or the fields of a GGUF header without the architecture's prefix. source: the file, for
    errors. transformers checks values that are not numbers.
    """
    for field, value in _fields(config):
        name = field.rsplit("/", 1)[-1]
        for number in value if isinstance(value, list) else [value]:
            if type(number) not in (int, float):
                continue
            if name in _MAX_VALUES and not 1 <= number <= _MAX_VALUES[name]:
                raise UsageError(f"{source} states {field} = {number!r}. Allowed: 1 to {_MAX_VALUES[name]}.")
            if name in _POSITIVE_FIELDS and not (math.isfinite(number) and number > 0):
                raise UsageError(f"{source} states {field} = {number!r}. It must be a finite number above 0.")
    for heads, kv_heads in _HEAD_FIELDS:
        queries, keys = config.get(heads), config.get(kv_heads)
        if type(queries) is int and type(keys) is int and queries % keys:
            raise UsageError(f"{source} states {heads} = {queries}, which {kv_heads} = {keys} does not divide.")
    if type(config.get("head_dim")) is int and config["head_dim"] % 2:
        raise UsageError(f"{source} states head_dim = {config['head_dim']}. RoPE needs an even one.")


def _fields(config: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield every field and its value; fields of nested objects are named outer/inner."""
    for name, value in config.items():
        if isinstance(value, Mapping) and depth < 8:
            yield from _fields(value, f"{prefix}{name}/", depth + 1)
        else:
            yield f"{prefix}{name}", value
