"""Calls kvpress' presses on plain tensors, and reads which prompt tokens a method of this project keeps.

kvpress requires an older transformers than this project. Its presses run under a newer one too, but the package's own
`__init__` imports what is not installed and patches transformers' attention. So the presses are imported without it,
from the folder that scripts/test.sh installs.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecache.cache.base import CacheMethod, Shape
from sparsecache.cache.model_cache import ModelCache

LENGTHS = (5, 33, 64, 131)
HEAD_DIM = 16
_FOLDER = Path(sys.prefix) / "kvpress"


@pytest.fixture(scope="session")
def kvpress() -> Any:
    """Return a function from the name of a module below kvpress.presses to the module; skip without kvpress."""
    if not (_FOLDER / ".installed").is_file():
        pytest.skip("kvpress is not installed; scripts/test.sh installs it where PyPI can be reached")
    if str(_FOLDER) not in sys.path:
        sys.path.append(str(_FOLDER))
    for name in ("kvpress", "kvpress.presses"):
        if name not in sys.modules:
            package = ModuleType(name)
            package.__path__ = [str(_FOLDER / name.replace(".", "/"))]
            sys.modules[name] = package
    return lambda name: importlib.import_module(f"kvpress.presses.{name}")


def random_prompt(length: int, group: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [H, L, D], and k, v [G, L, D] with `group` query heads per KV head; H is 4."""
    generator = torch.Generator().manual_seed(1000 * length + 10 * group + seed)
    q, k, v = (torch.randn(heads, length, HEAD_DIM, generator=generator) for heads in (4, 4 // group, 4 // group))
    return 2 * q, k, v  # attention with peaks


def attention_module(q: Tensor, k: Tensor, layer: int = 0, layers: int = 1) -> Any:
    """Return what a press needs of a transformers attention module, whose hidden states are the queries."""
    config = SimpleNamespace(
        num_attention_heads=len(q), num_key_value_heads=len(k), num_hidden_layers=layers, _attn_implementation="sdpa"
    )
    return SimpleNamespace(config=config, head_dim=q.shape[2], q_proj=lambda hidden: hidden, layer_idx=layer)


def press_arguments(q: Tensor, k: Tensor, v: Tensor, **module: int) -> tuple[Any, ...]:
    """Return the arguments of a press' `score` and `compress`, with queries that no rotation changes."""
    length = q.shape[1]
    no_rotation = torch.ones(1, length, q.shape[2]), torch.zeros(1, length, q.shape[2])
    hidden = q.transpose(0, 1).reshape(1, length, -1)
    kwargs = {"position_embeddings": no_rotation}
    return attention_module(q, k, **module), hidden, k[None].clone(), v[None].clone(), None, kwargs


def kept_by_press(press: Any, q: Tensor, k: Tensor, v: Tensor) -> list[list[int]]:
    """Return the positions that a press keeps, per KV head and sorted."""
    keys, _ = press.compress(*press_arguments(q, k, v))
    return [_positions(of_head, keys_of_head) for of_head, keys_of_head in zip(keys[0], k, strict=True)]


def kept_by_method(method: CacheMethod, q: Tensor, k: Tensor, v: Tensor) -> list[list[int]]:
    """Return the positions that a method keeps of a prompt, per KV head and sorted."""
    return kept_by_layers(method, q, k, v, layers=1)[0]


@torch.inference_mode()
def kept_by_layers(method: CacheMethod, q: Tensor, k: Tensor, v: Tensor, layers: int) -> list[list[list[int]]]:
    """As kept_by_method, in each layer of a model; all layers get the same prompt."""
    shape, length = Shape(layers, len(q), len(k), q.shape[2]), q.shape[1]
    cpu, slots, slot = torch.device("cpu"), 2, 1
    cache = ModelCache(method, shape, [cpu] * layers, slots, length + 3, 3, torch.float32)
    kept = []
    for layer in cache.layers:
        layer.prefill(slot, q, k, v)
        if hasattr(layer, "num_tokens"):
            keys, counts = layer.keys, layer.num_tokens[slot]
        else:
            keys = layer.kv.keys
            counts = length - layer.num_evicted[slot] if layer.sparse else torch.full((len(k),), length)
        kept.append([_positions(keys[slot, g, :n], k[g]) for g, n in enumerate(counts.tolist())])
    return kept


def _positions(keys: Tensor, of_prompt: Tensor) -> list[int]:
    """Return the positions in the prompt [L, D] of keys [N, D], sorted."""
    same = (keys[:, None] == of_prompt).all(-1)
    assert bool((same.sum(1) == 1).all())
    return sorted(same.int().argmax(1).tolist())
