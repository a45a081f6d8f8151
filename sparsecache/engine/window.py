"""How many tokens a checkpoint is made for, from its configuration."""

from typing import Any


def context_window(config: Any) -> int | None:
    """Tokens that prompt and answer may take; None if the configuration states none.

    `config` is a transformers configuration. `max_position_embeddings` counts, except where scaled RoPE reaches
    further, as transformers computes it (modeling_rope_utils):

    linear, dynamic: factor x max_position_embeddings, which is the length before the scaling
    yarn: factor x original_max_position_embeddings, which is max_position_embeddings where it is not stated
    llama3, longrope: max_position_embeddings is the length after the scaling; if it equals the original length,
        nothing but the factor tells how far the scaling reaches

    RoPE that differs by layer (Gemma 3) is not multiplied out: those configurations state the final length.
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
