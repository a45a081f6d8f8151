"""A slow reference of selection by partial keys, and calibrated methods, for the tests of Loki and Double Sparsity."""

import torch
from torch import Tensor

from sparsecache.cache.base import Shape
from sparsecache.cache.partial_keys import PartialKeyMethod
from tests.methods.stepping import Kept, Text, budget_tokens


def calibration_qk(shape: Shape, seed: int = 7, tokens: int = 50) -> list[tuple[Tensor, Tensor]]:
    """Return q [G, H / G, L, D] and k [G, L, D] per layer, of channels that differ in size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(shape.layers, shape.kv_heads, 1, shape.head_dim, generator=generator) + 0.1
    group = shape.heads // shape.kv_heads
    found = []
    for layer in range(shape.layers):
        q = torch.randn(shape.kv_heads, group, tokens, shape.head_dim, generator=generator)
        k = torch.randn(shape.kv_heads, tokens, shape.head_dim, generator=generator) * sizes[layer] + 2
        found.append((q, k))
    return found


def calibrated(method: PartialKeyMethod, qk: list[tuple[Tensor, Tensor]]) -> PartialKeyMethod:
    """Return a method that has been given q and k of every layer."""
    for layer, (q, k) in enumerate(qk):
        method.calibrate(layer, q, k)
    return method


def selected(text: Text, layer: int, budget: float, matrices: list[Tensor]) -> list[Kept]:
    """Return the past positions per step and KV head; matrices: [D, I] float64 per KV head."""
    return [
        [_of_head(text, layer, kv, past, budget, matrix) for kv, matrix in enumerate(matrices)]
        for past in range(text.prompt, text.prompt + text.new)
    ]


def _of_head(text: Text, layer: int, kv: int, past: int, budget: float, matrix: Tensor) -> list[int]:
    near = [-float("inf")] * past
    keys = text.k[layer, kv, :past].double() @ matrix
    for head in range(kv * text.group, (kv + 1) * text.group):
        scores = (keys @ (text.q[layer, head, past].double() @ matrix)).tolist()
        best = max(scores)
        near = [max(each, score - best) for each, score in zip(near, scores, strict=True)]
    return sorted(sorted(range(past), key=lambda at: -near[at])[: budget_tokens(budget, past)])
