"""InfiniGen on a GPU: every step equals the slow reference, offloading changes nothing, host memory is pinned."""

import math
from typing import Any

import pytest
import torch

from sparsecache.cache.base import Shape
from sparsecache.cache.full import FullCache
from sparsecache.methods.infinigen.skewing import skewing_matrix
from tests.methods.infinigen.compared import CPU, ComparedRun, select_tokens, small_numbers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine")
GPU = torch.device("cuda")
SHAPE = Shape(layers=3, heads=8, kv_heads=2, head_dim=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"budget": 0.3, "sinks": 1, "recent": 2},
        {"budget": 9, "fetch": "per_head", "offload": True},
        {"budget": 9, "offload": True, "gpu_cache": 7},
        {"budget": 0.5, "alpha": math.inf, "offload": True, "gpu_cache": 100},
    ],
    ids=str,
)
def test_every_step_equals_the_reference(options: dict[str, Any], dtype: torch.dtype) -> None:
    options = {"alpha": 1.0, "skew": False, **options}
    run = ComparedRun(SHAPE, (45, 12), options, draw=small_numbers(2), device=GPU, dtype=dtype, new_tokens=16)
    for rows in [[0, 1], [1, 0], [1], [0]] * 4:
        run.step(rows)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 4.0, "budget": 0.5, "partial_weight_ratio": 0.25},
        {"alpha": math.inf, "budget": 0.5, "group": "softmax", "top_p": 0.8},
        {"alpha": 4.0, "budget": 0.5, "top_p": 0.6, "fetch": "per_head", "sinks": 1},
        {"alpha": 4.0, "budget": 0.5, "partial_weight_ratio": 1.0},
        {"alpha": 4.0, "budget": 0.5, "partial_weight_ratio": 1.0, "partial_bits": 8},
        {"alpha": math.inf, "budget": 0.3, "partial_weight_ratio": 1.0, "partial_bits": 4, "group": "softmax"},
    ],
    ids=str,
)
def test_random_keys_too(options: dict[str, Any]) -> None:
    run = ComparedRun(SHAPE, (45, 12), options, device=GPU)
    for _ in range(7):
        run.step()


def test_offloaded_keys_and_values_are_pinned_and_change_nothing() -> None:
    runs = []
    for options in ({}, {"offload": True}, {"offload": True, "gpu_cache": 3}, {"offload": True, "gpu_cache": 500}):
        chosen = {"alpha": 4.0, "budget": 0.2, **options}
        run = ComparedRun(SHAPE, (300, 80), chosen, device=GPU, new_tokens=20, compare=False)
        runs.append([step for _ in range(19) for step in run.step()])
        for layer in run.sparse_layers:
            cache = run.layer(layer)
            assert cache.store.is_pinned() == bool(options) and cache.store.is_cuda != bool(options)
            assert cache._partial.keys.is_cuda
        dense = run.cache.layers[0]
        assert isinstance(dense, FullCache) and dense.kv.keys.is_cuda
    for other in runs[1:]:
        for first, second in zip(runs[0], other, strict=True):
            assert first.selected == second.selected
            torch.testing.assert_close(first.out, second.out, rtol=1e-5, atol=1e-5)


def test_skewing_matrices_made_on_the_gpu_are_those_of_the_cpu() -> None:
    q = torch.randn(2, 4, 500, 64) * torch.logspace(1, -1, 64)
    cpu, gpu = (skewing_matrix(q.to(device)).cpu() for device in (CPU, GPU))
    torch.testing.assert_close(gpu @ gpu.mT, torch.eye(64).expand_as(gpu), rtol=0, atol=1e-5)
    agreement = (cpu * gpu).sum(1).abs()  # singular vectors have no sign
    torch.testing.assert_close(agreement, torch.ones_like(agreement), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_of_a_prompt_made_on_the_gpu_are_those_of_the_cpu(bits: int, dtype: torch.dtype) -> None:
    q, k = (3 * torch.randn(heads, 5000, 64) for heads in (8, 2))
    made = []
    for device in (CPU, GPU):
        run = ComparedRun(
            SHAPE, (2,), {"partial_bits": bits, "partial_weight_ratio": 1.0}, device=device, dtype=dtype,
            new_tokens=5000, compare=False,
        )  # fmt: skip
        partial = run.layer(1)._partial
        partial.prefill(0, q.to(device, dtype), k.to(device, dtype))
        made.append([x[0].cpu() for x in partial.keys[:3]])
    assert all(torch.equal(cpu, gpu) for cpu, gpu in zip(*made, strict=True))


@pytest.mark.parametrize("length", [7, 20_000])
@pytest.mark.parametrize("fetch", ["mean", "per_head"])
def test_the_plain_selection_is_that_of_the_cpu(length: int, fetch: Any) -> None:
    """Scores have many ties."""
    scores = torch.randint(-9, 9, (3, 8, length)) / 2
    scores[1, :, length // 2 :] = -torch.inf
    cap = torch.tensor([length // 3 + 1, length, 5])
    for alpha in (0.0, 1.5, math.inf):
        cpu, gpu = (select_tokens(scores.to(x), 2, alpha, cap.to(x), fetch).cpu() for x in (CPU, GPU))
        assert torch.equal(cpu, gpu)
