"""The window of a checkpoint with scaled RoPE, against published configurations."""

import pytest
from transformers import LlamaConfig, Qwen2Config

from sparsecache.engine.window import context_window

_THETA = {"rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("stated", "rope", "expected"),
    [
        (4096, {}, 4096),
        # Qwen2.5's documented YaRN configuration: 4 x 32,768.
        (
            32768,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            131072,
        ),
        (131072, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (32768, {"rope_type": "yarn", "factor": 4.0}, 131072),
        (2048, {"rope_type": "linear", "factor": 4.0}, 8192),
        (2048, {"rope_type": "dynamic", "factor": 2.0}, 4096),
        # Llama 3.1: the stated length is the final one.
        (
            131072,
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            131072,
        ),
    ],
)
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
def test_the_window_of_scaled_rope(kind, stated, rope, expected) -> None:
    assert context_window(kind(max_position_embeddings=stated, rope_parameters={**_THETA, **rope})) == expected
