"""The attention function that a transformers model calls in every layer, and what a model's calls look like.

It is registered with transformers under a name of its own. While a handler is active, the handler sees each call and
may return its output; transformers' own sdpa computes all other calls.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sparsecache.cache.base import Shape
from sparsecache.errors import UsageError, one_line

NAME = "sparsecache"
_PROBE_TOKENS = 3
# Arguments of an attention call that change the softmax, which no cache applies.
_UNSUPPORTED = {
    "softcap": "logit soft-capping",
    "s_aux": "attention sinks as logits",
    "position_bias": "a position bias",
}


@dataclass(frozen=True)
class AttentionCall:
    """A layer's call: module; q [B, H, L, D]; k, v [B, G, L, D], rotated; scaling of the scores; other arguments."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    scaling: float
    arguments: dict[str, Any]

    @property
    def layer(self) -> int:
        """The layer's index among all layers of the model; -1 if its module has none."""
        index = getattr(self.module, "layer_idx", None)
        return index if isinstance(index, int) else -1


AttentionHandler = Callable[[AttentionCall], Tensor | None]
"""Returns the attention output [B, H, L, D]; None: sdpa computes it."""

_handler: ContextVar[AttentionHandler | None] = ContextVar("attention_handler", default=None)


@contextmanager
def handle_attention(handler: AttentionHandler) -> Iterator[None]:
    """Pass the attention calls of all models that use the attention function to `handler` inside the block."""
    token = _handler.set(handler)
    try:
        yield
    finally:
        _handler.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' attention functions do: the output is [B, L, H, D]."""
    handler = _handler.get()
    if handler is not None:
        applied = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        out = handler(AttentionCall(module, query, key, value, applied, arguments))
        if out is not None:
            return out.transpose(1, 2).contiguous(), None
    sdpa = AttentionInterface()["sdpa"]
    out, _ = sdpa(module, query, key, value, attention_mask, scaling=scaling, **arguments)
    return out, None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])


@dataclass(frozen=True)
class FullAttentionLayer:
    """A layer of a model that attends to all past tokens.

    module: its attention module. index: its index among all layers of the model. query_scale: what queries are
    multiplied by so that scores divided by sqrt(D) have the model's own scaling.
    """

    module: nn.Module
    index: int
    query_scale: float
    device: torch.device


@dataclass(frozen=True)
class ModelAttention:
    """The full-attention layers of a model, in order, their shape and dtype, and the attention modules of all layers.

    num_layers: all layers of the model, with any attention.
    """

    layers: list[FullAttentionLayer]
    shape: Shape
    dtype: torch.dtype
    num_layers: int
    modules: list[nn.Module]


@torch.inference_mode()
def inspect_attention(model: PreTrainedModel, window: int | None) -> ModelAttention:
    """Switch a model to the attention function, run a few tokens, and return what its layers called it with.

    window: most tokens of a sequence. A layer whose sliding window is not smaller counts as full attention.
    Raises UsageError for a model whose attention cannot be computed by the caches.
    """
    name = f"--engine transformers with a cache method: {type(model).__name__}"
    calls: list[AttentionCall] = []
    cache = DynamicCache(config=model.config)

    def record(call: AttentionCall) -> None:
        _check_softmax(name, call)
        calls.append(call)

    input_ids = torch.arange(_PROBE_TOKENS, device=model.device)[None]
    try:
        model.set_attn_implementation(NAME)
        with handle_attention(record):
            model(input_ids=input_ids, past_key_values=cache, use_cache=True)
    except (torch.OutOfMemoryError, UsageError):
        raise
    except Exception as error:
        raise UsageError(f"{name} cannot run with another attention function: {one_line(error)}") from error
    calls = [call for call in calls if call.layer >= 0]
    _check_calls(name, calls, cache)
    full = [call for call in calls if _is_full(call, cache, window)]
    if not full:
        raise UsageError(f"{name} has no full-attention layer that a cache method could serve. Use --method vanilla.")
    shapes = {(call.q.shape[1], call.k.shape[1], call.q.shape[3]) for call in full}
    if len(shapes) > 1:
        listed = ", ".join("x".join(map(str, shape)) for shape in sorted(shapes))
        raise UsageError(
            f"{name} has full-attention layers of different shapes (query heads x KV heads x channels: {listed}). "
            f"Caches need one shape. Use --method vanilla."
        )
    heads, kv_heads, head_dim = shapes.pop()
    layers = [FullAttentionLayer(call.module, call.layer, call.scaling * head_dim**0.5, call.q.device) for call in full]
    return ModelAttention(
        layers, Shape(len(full), heads, kv_heads, head_dim), full[0].q.dtype, len(cache.layers),
        [call.module for call in calls],
    )  # fmt: skip


def _check_softmax(name: str, call: AttentionCall) -> None:
    for argument, meaning in _UNSUPPORTED.items():
        if call.arguments.get(argument) is not None:
            raise UsageError(f"{name} has {meaning}, which no cache applies. Use --method vanilla.")


def _check_calls(name: str, calls: list[AttentionCall], cache: DynamicCache) -> None:
    """Raise UsageError for attention that caches would compute wrongly."""
    if not calls:
        raise UsageError(
            f"{name} does not call transformers' attention interface, so no cache method can serve it. Use --method "
            f"vanilla."
        )
    modules = [call.module for call in calls]
    shared = [
        call.layer
        for call in calls
        if modules.count(call.module) > 1
        or call.layer >= len(cache.layers)
        or not isinstance(cache.layers[call.layer], DynamicLayer)
        or cache.layers[call.layer].get_seq_length() != _PROBE_TOKENS
    ]
    if shared:
        raise UsageError(
            f"{name} has layers without keys and values of their own (layer {shared[0]}), which caches do not serve. "
            f"Use --method vanilla."
        )


def _is_full(call: AttentionCall, cache: DynamicCache, window: int | None) -> bool:
    """Whether a layer attends to all past tokens of a sequence, with keys and values of the same size."""
    layer = cache.layers[call.layer]
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):  # others keep more than keys and values
        return False
    limits = getattr(layer, "sliding_window", None), call.arguments.get("sliding_window")
    if any(limit is not None and (window is None or limit < window) for limit in limits):
        return False
    return call.q.shape[3] == call.k.shape[3] == call.v.shape[3]
