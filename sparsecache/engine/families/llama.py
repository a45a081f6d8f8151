"""Llama 2 and 3 (https://arxiv.org/abs/2307.09288, https://arxiv.org/abs/2407.21783), Vicuna, LongChat."""

from typing import Any

from sparsecache.engine.families import base


class Family(base.Family):
    """Biases if config.json asks for them."""

    def qkv_bias(self, config: Any) -> bool:
        return bool(config.attention_bias)

    def output_bias(self, config: Any) -> bool:
        return bool(config.attention_bias)

    def mlp_bias(self, config: Any) -> bool:
        return bool(config.mlp_bias)
