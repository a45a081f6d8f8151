"""The rotation of a position in a transformers model, for cache methods that rotate keys or queries back.

A model's rotary embedding gives cosines and sines. What its layers do with them differs, so it is measured: over equal
tokens, the queries and keys of a layer differ by their rotation alone.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from sparsecache.engine.general.attention import AttentionCall, FullAttentionLayer, handle_attention
from sparsecache.engine.general.loading import rope_types
from sparsecache.errors import UsageError
from sparsecache.kernels.rotation import Rotation, RotationOf, rotate_rows, rotate_rows_back

LENGTH_DEPENDENT = {"dynamic", "longrope"}
"""RoPE types whose rotation depends on the length of the text."""
_TOKENS, _TOLERANCE = 17, 0.03  # relative; rounding in bfloat16 is far below it, a wrong rotation far above


@torch.inference_mode()
def rotation_of(model: Any, layers: list[FullAttentionLayer]) -> RotationOf:
    """Return the rotation that all layers apply to queries and keys.

    Channel i of a head must pair with channel i + R / 2, R the rotated channels, which come first. Raises UsageError
    for another rotation, different ones, and none.
    """
    calls = _calls_over_equal_tokens(model, {layer.module for layer in layers})
    if not rope_types(model) & LENGTH_DEPENDENT:
        for module in model.modules():
            rotation = _embedding(module)
            if rotation is not None and calls and all(_is_applied(rotation, call) for call in calls):
                return rotation
    raise UsageError(
        f"The method needs the rotation of each position, which is not known for {type(model).__name__}: not all its "
        f"full-attention layers have a RoPE that pairs the halves of a head and depends on the position alone. Choose "
        f"another --method."
    )


def _calls_over_equal_tokens(model: Any, modules: set[nn.Module]) -> list[AttentionCall]:
    calls: list[AttentionCall] = []

    def record(call: AttentionCall) -> None:
        if call.module in modules:
            calls.append(call)

    with handle_attention(record):
        model.base_model(input_ids=torch.ones((1, _TOKENS), dtype=torch.int64, device=model.device), use_cache=False)
    return calls


def _embedding(module: nn.Module) -> RotationOf | None:
    """Return the cosines and sines of a module by position; None for a module that is not a rotary embedding."""
    if not hasattr(module, "inv_freq") and not hasattr(module, "full_attention_inv_freq"):
        return None
    by_type = "layer_type" in inspect.signature(module.forward).parameters
    more = {"layer_type": "full_attention"} if by_type else {}

    def rotation(positions: Tensor) -> Rotation:
        x = torch.empty((1, 1), dtype=torch.float32, device=positions.device)  # gives the dtype
        cos, sin = module(x, positions.reshape(1, -1), **more)
        return Rotation(*(table[0].view(*positions.shape, table.shape[-1]) for table in (cos, sin)))

    return rotation


def _is_applied(rotation: RotationOf, call: AttentionCall) -> bool:
    """Whether a rotation takes the first token's query and key to those of the tokens after it."""
    cos, sin = rotation(torch.arange(_TOKENS, device=call.q.device))
    if cos.shape[-1] > call.q.shape[-1]:
        return False
    for x in (call.q[0], call.k[0]):
        first = rotate_rows_back(x[:, :1], Rotation(cos[:1], sin[:1]))
        difference = rotate_rows(first, Rotation(cos, sin)) - x
        if not difference.norm() <= _TOLERANCE * x.float().norm():
            return False
    return True
