"""Compute the context window of a checkpoint from its configuration."""

from typing import Any


def context_window(config: Any) -> int | None:
    """Return the most tokens of prompt and answer together; None if the configuration does not state it.

    config: a transformers configuration. The window is `max_position_embeddings`, unless scaled RoPE extends it, as in
    transformers' modeling_rope_utils:

    linear, dynamic: factor x max_position_embeddings, the length before scaling
    yarn: factor x original_max_position_embeddings, or factor x max_position_embeddings where that is not stated
    llama3, longrope: max_position_embeddings, the length after scaling; factor x that if it equals the original length

    RoPE parameters per layer (Gemma 3) do not count: those configurations state the final length.
    """
    text = config.get_text_config()
    stated = getattr(text, "max_position_embeddings", None)
    if type(stated) is not int:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    kind, factor = rope.get("rope_type", "default"), rope.get("factor")
    original = rope.get("original_max_position_embeddings") or stated
    if factor is None or factor <= 1:
        return stated
    if kind in ("linear", "dynamic"):
        return int(factor * original)
    if kind == "yarn" or (kind in ("llama3", "longrope") and original == stated):
        return int(factor * original)
    return stated
