"""InfiniGen on a GPU: the selections of the CPU on the same scores, outputs to tolerance, pinned memory."""

import math

import pytest
import torch

from sparsecache.cache.base import Shape
from sparsecache.kernels.selection import select
from sparsecache.methods.infinigen.skewing import skewing_matrix

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine")
GPU = torch.device("cuda")
SHAPE = Shape(layers=3, heads=8, kv_heads=2, head_dim=64)


@pytest.mark.parametrize("fetch", ["mean", "per_head"])
@pytest.mark.parametrize("alpha", [0.0, 1.5, math.inf])
@pytest.mark.parametrize("length", [7, 1000, 20_000])
def test_the_same_selection_from_the_same_scores(length, alpha, fetch) -> None:
    scores = torch.randint(-9, 9, (3, 8, length)) / 2  # many ties
    scores[1, :, length // 2 :] = -torch.inf
    cap = torch.tensor([length // 3 + 1, length, 5])
    here, there = (select(scores.to(each), 2, alpha, cap.to(each), fetch).cpu() for each in ("cpu", GPU))
    assert torch.equal(here, there)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"budget": 0.3, "sinks": 1, "recent": 2},
        {"budget": 9, "fetch": "per_head", "offload": True},
        {"budget": 9, "offload": True, "gpu_cache": 7},
        {"budget": 6, "capacity": 14, "eviction": "counter"},
        {"budget": 6, "capacity": 0.4, "eviction": "lru", "offload": True, "gpu_cache": 5},
        {"budget": 6, "capacity": 14, "eviction": "fifo", "offload": True, "gpu_cache": 100},
    ],
    ids=str,
)
def test_every_step_is_that_of_the_page(options, dtype, play, small_numbers) -> None:
    played = play(
        SHAPE,
        (45, 12),
        {"alpha": 1.0, "skew": False, **options},
        draw=small_numbers(2),
        device=GPU,
        dtype=dtype,
        new_tokens=16,
    )
    for order in [[0, 1], [1, 0], [1], [0]] * 4:
        played.step(order)


def test_skewed_keys_too(play) -> None:
    played = play(SHAPE, (45, 12), {"alpha": 4.0, "budget": 0.5, "partial_weight_ratio": 0.25}, device=GPU)
    for _ in range(7):
        played.step()


def test_offloaded_keys_and_values_lie_in_pinned_memory_and_change_nothing(play) -> None:
    runs = []
    for options in ({}, {"offload": True}, {"offload": True, "gpu_cache": 3}, {"offload": True, "gpu_cache": 500}):
        played = play(
            SHAPE, (300, 80), {"alpha": 4.0, "budget": 0.2, **options}, device=GPU, new_tokens=20, compare=False
        )
        runs.append([step for _ in range(19) for step in played.step()])
        unbounded, offload = played.method._unbounded, bool(options)
        stores = [unbounded.store] if unbounded else [played.method._pool.keys, played.method._pool.values]
        for store in stores:
            assert store.is_pinned() == offload and store.is_cuda != offload
        assert played.method._partial.keys.is_cuda and played.method._dense.keys.is_cuda
    for other in runs[1:]:
        for first, second in zip(runs[0], other, strict=True):
            assert first.selected == second.selected
            torch.testing.assert_close(first.out, second.out, rtol=1e-5, atol=1e-5)


def test_skewing_matrices_made_on_the_gpu_are_orthogonal_and_those_of_the_cpu() -> None:
    q = torch.randn(2, 4, 500, 64) * torch.logspace(1, -1, 64)
    here, there = (skewing_matrix(q.to(each)).cpu() for each in ("cpu", GPU))
    torch.testing.assert_close(there @ there.mT, torch.eye(64).expand_as(there), rtol=0, atol=1e-5)
    agreement = (here * there).sum(1).abs()  # singular vectors have no sign
    torch.testing.assert_close(agreement, torch.ones_like(agreement), rtol=0, atol=1e-4)
