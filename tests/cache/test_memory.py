"""The memory of caches is what a token of the full cache takes, less or more by what a method keeps."""

import pytest
import torch

from sparsecache.cache.base import Shape
from sparsecache.cache.memory import CacheMemory
from sparsecache.cache.model_cache import ModelCache
from sparsecache.methods import make_method

SHAPE = Shape(layers=4, heads=4, kv_heads=2, head_dim=16)
FULL = 2 * 4 * 2 * 16 * 4  # bytes of a token: key and value x layers x KV heads x channels x float32
SLOTS, TOKENS, NEW = 3, 1000, 20


def memory(name: str, **options: object) -> CacheMemory:
    method = make_method(name, options)
    return ModelCache(method, SHAPE, [torch.device("cpu")] * 4, SLOTS, TOKENS, NEW, torch.float32).memory


def test_the_full_cache_takes_the_bytes_of_its_shape() -> None:
    found = memory("vanilla")
    assert (found.layers, found.full_token_nbytes, found.host_token_nbytes) == (4, FULL, 0)
    assert found.token_nbytes == pytest.approx(FULL, rel=0.001)


@pytest.mark.parametrize(("dense", "budget"), [(0, 100), (2, 100), (2, 0.5)])
def test_eviction_takes_its_budget_in_sparse_layers(dense: int, budget: float) -> None:
    rows = (budget if budget > 1 else budget * TOKENS) + NEW
    expected = FULL * (dense + (4 - dense) * rows / TOKENS) / 4
    assert memory("snapkv", budget=budget, dense_layers=dense).token_nbytes == pytest.approx(expected, rel=0.01)


def test_selection_keeps_everything_and_its_own_state() -> None:
    pages = 2 * TOKENS // 20 * 2 * 16 * 4 * 2 / TOKENS  # lowest and highest key of each page, in two sparse layers
    found = memory("quest", page=20, dense_layers=2)
    assert found.token_nbytes == pytest.approx(FULL + pages, rel=0.01)
    second_copy_of_keys = FULL // 4  # half of the two sparse layers
    assert memory("sparq", dense_layers=2).token_nbytes == pytest.approx(FULL + second_copy_of_keys, rel=0.01)
