"""Mistral (https://arxiv.org/abs/2310.06825): Llama; early checkpoints have sliding-window attention."""

from typing import Any

from sparsecache.engine.families import base


class Family(base.Family):
    """No biases; `sliding_window` applies to every layer, unless null."""

    def sliding_window(self, config: Any) -> int | None:
        window: int | None = config.sliding_window
        return window
