"""Qwen2 and Qwen2.5 (https://arxiv.org/abs/2407.10671, https://arxiv.org/abs/2412.15115)."""

from typing import Any

from sparsecache.engine.families import base


class Family(base.Family):
    """Biases on query, key and value only; some layers may have sliding-window attention."""

    def qkv_bias(self, config: Any) -> bool:
        return True

    def sliding_window(self, config: Any) -> int | None:
        slides = "sliding_attention" in (config.layer_types or ())
        window: int | None = config.sliding_window if slides else None
        return window
