"""Qwen3 (https://arxiv.org/abs/2505.09388): an RMS norm of each head's query and key, before RoPE."""

from typing import Any

from sparsecache.engine.families import base, qwen2


class Family(base.Family):
    """QK norm; attention biases if config.json asks for them; some layers may have sliding-window attention."""

    qk_norm = True

    def qkv_bias(self, config: Any) -> bool:
        return bool(config.attention_bias)

    def output_bias(self, config: Any) -> bool:
        return bool(config.attention_bias)

    sliding_window = qwen2.Family.sliding_window
