"""The checks of the contract that need no model: the caches of a method on random queries, keys and values."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsecache.cache.base import CacheMethod, LayerCache, Shape
from sparsecache.cache.eviction import BoundedKVCache
from sparsecache.cache.model_cache import ModelCache
from sparsecache.kernels.rotation import Rotation, RotationOf

CPU = torch.device("cpu")


@torch.inference_mode()
def check_counts(method: CacheMethod) -> None:
    """A cache attends to the new token, and to as many past ones as it records; to all if it is not sparse.

    The value of position p is one at channel p alone, so a channel of the output says how much that token weighs.
    """
    shape = Shape(layers=3, heads=4, kv_heads=2, head_dim=64)
    cache = _model_cache(method, shape, slots=2)
    values, slots = torch.eye(64).expand(2, -1, -1), torch.tensor([1])
    for layer in cache.layers:
        layer.prefill(1, torch.randn(4, 40, 64) / 8, torch.randn(2, 40, 64) / 8, values[:, :40].clone())
    cache.start_sequence(1, 40)
    for past in range(40, 46):
        for index, layer in enumerate(cache.layers):
            q, k, v = torch.randn(1, 4, 1, 64) / 8, torch.randn(1, 2, 1, 64) / 8, values[None, :, past : past + 1]
            _speculate(layer, q, slots)
            out = layer.attend(q, k, v, slots)[0, :, 0].view(2, 2, 64)  # [G, H / G, D]
            if layer.estimates_rest:
                out = out - out[..., :past].amin(2, keepdim=True)
            attended = (out > 1e-4).any(1)
            require(bool(attended[:, past].all()), f"layer {index} does not attend to the new token")
            found = attended[:, :past].sum(1).tolist()
            recorded = cache.layer_stats[index].counts[1].tolist() if layer.sparse else [past, past]
            what = "records" if layer.sparse else "is not sparse and so must attend to"
            require(
                found == recorded,
                f"layer {index} {what} {recorded} past tokens per KV head, but attends to {found} of {past}",
            )
        cache.end_step(slots)


@torch.inference_mode()
def check_scores(method: CacheMethod) -> None:
    """No score is NaN, also for a prompt of one token, and for one of equal tokens (a repeated word in layer 0).

    Base classes raise ValueError for scores of a prompt that are NaN. A step selects no past token by such scores.
    """
    cache = _model_cache(method, Shape(layers=3, heads=4, kv_heads=2, head_dim=8), slots=1)
    slots = torch.tensor([0])
    for prompt, distinct, repeats in (("random tokens", 40, 1), ("equal tokens", 1, 40), ("one token", 1, 1)):
        for layer in cache.layers:
            try:
                layer.prefill(0, *(torch.randn(heads, distinct, 8).repeat(1, repeats, 1) for heads in (4, 2, 2)))
            except ValueError as error:
                error.add_note(f"The prompt is of {prompt}.")
                raise
        cache.start_sequence(0, distinct * repeats)
        for _ in range(3):
            for index, layer in enumerate(cache.layers):
                _speculate(layer, torch.randn(1, 4, 1, 8), slots)
                q, k, v = (torch.randn(1, heads, 1, 8) for heads in (4, 2, 2))
                layer.attend(q, k, v, slots)
                step = f"a step of layer {index} after a prompt of {prompt}"
                if isinstance(layer, BoundedKVCache):
                    require(not layer.scores.isnan().any(), f"{step} leaves scores that are NaN")
                counts = cache.layer_stats[index].counts[0].tolist() if layer.sparse else [1]
                require(min(counts) > 0, f"{step} attends to {counts} past tokens per KV head. Is a score NaN?")
            cache.end_step(slots)
        cache.free_slot(0)


@torch.inference_mode()
def check_shapes(method: CacheMethod) -> None:
    """A cache does not change its inputs, and its output has the shape and dtype of q."""
    shape = Shape(layers=2, heads=4, kv_heads=2, head_dim=8)
    cache = _model_cache(method, shape, slots=2)
    slots = torch.tensor([1])
    for layer in cache.layers:
        prompt = [torch.randn(heads, 40, 8) for heads in (4, 2, 2)]
        _unchanged(layer.prefill, 1, *prompt)
    cache.start_sequence(1, 40)
    for layer in cache.layers:
        token = [torch.randn(1, heads, 1, 8) for heads in (4, 2, 2)]
        _speculate(layer, torch.randn(1, 4, 1, 8), slots)
        out = _unchanged(layer.attend, *token, slots)
        require(out.shape == (1, 4, 1, 8) and out.dtype == torch.float32, f"attend returned {tuple(out.shape)}")
        require(bool(out.isfinite().all()), "attend returned values that are not finite")
        require(layer.step_nbytes(40, 4).device >= 0, "step_nbytes must return bytes")
    cache.end_step(slots)
    json.dumps(cache.report(1), allow_nan=False)


def check_free_empty_slot(method: CacheMethod) -> None:
    """Freeing a free slot does nothing."""
    cache = _model_cache(method, Shape(layers=2, heads=4, kv_heads=2, head_dim=8), slots=3)
    for slot in (0, 1, 2, 0, 1, 2):
        cache.free_slot(slot)


def plain_rope(channels: int, base: float = 10000.0) -> RotationOf:
    """Return the rotations of RoPE without scaling, for a method that is not given to an engine."""
    frequencies = (base ** (-torch.arange(0, channels, 2) / channels)).repeat(2)

    def rotation(positions: Tensor) -> Rotation:
        angles = positions[..., None] * frequencies
        return Rotation(angles.cos(), angles.sin())

    return rotation


def _model_cache(method: CacheMethod, shape: Shape, slots: int) -> ModelCache:
    if method.uses_rope:
        method.rope = plain_rope(shape.head_dim)
    if method.calibration_text() is not None:
        for layer in range(shape.layers):
            q = torch.randn(shape.kv_heads, shape.heads // shape.kv_heads, 40, shape.head_dim)
            method.calibrate(layer, q, torch.randn(shape.kv_heads, 40, shape.head_dim))
    return ModelCache(method, shape, [CPU] * shape.layers, slots, 50, 10, torch.float32)


def _speculate(layer: LayerCache, query: Tensor, slots: Tensor) -> None:
    """Give a cache a hidden state whose query is `query`, if it speculates."""
    if layer.speculation_source is not None:
        layer.speculate(torch.randn(len(slots), 16), _Query(query), slots)  # type: ignore[arg-type]


class _Query:
    """The projection of any hidden state to one query."""

    inputs: tuple[Tensor, ...] = ()

    def __init__(self, query: Tensor) -> None:
        self._query = query

    def __call__(self, hidden: Tensor, *, normed: bool) -> Tensor:
        return self._query


def _unchanged(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a call returns; fail if it changes one of the tensors among its arguments."""
    copies = [argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments]
    out = call(*copies)
    same = all(
        torch.equal(before, after)
        for before, after in zip(arguments, copies, strict=True)
        if isinstance(before, Tensor)
    )
    require(same, "q, k or v was changed")
    return out


def require(condition: bool, problem: str) -> None:
    """Raise AssertionError with the problem unless the condition holds."""
    if not condition:
        raise AssertionError(problem)
