"""Every method in bfloat16, with options that drop nothing, against dense attention over the same tensors."""

import pytest
import torch

from sparsecache.cache.base import ProjectQuery, Shape
from sparsecache.cache.model_cache import ModelCache
from sparsecache.kernels.attention import attention_over_rows
from sparsecache.methods import method_names
from sparsecache.testing.cache_checks import plain_rope
from sparsecache.testing.method_under_test import MethodUnderTest

SHAPE = Shape(layers=3, heads=4, kv_heads=2, head_dim=16)
PROMPTS, STEPS = (37, 70), 3


@pytest.mark.parametrize("name", method_names())
def test_attention_in_bfloat16_is_that_of_float32(name) -> None:
    subject = MethodUnderTest.of(name)
    generator = torch.Generator().manual_seed(7)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).bfloat16()

    method = subject.make(subject.lossless)
    if method.uses_rope:
        method.rope = plain_rope(SHAPE.head_dim)
    if method.calibration_text() is not None:
        for layer in range(SHAPE.layers):
            method.calibrate(layer, torch.randn(2, 2, 50, 16), torch.randn(2, 50, 16))
    longest = max(PROMPTS) + STEPS
    cache = ModelCache(method, SHAPE, [torch.device("cpu")] * 3, 2, longest, STEPS, torch.bfloat16)
    slots = torch.arange(len(PROMPTS))
    texts = [(draw(3, 4, n + STEPS, 16), draw(3, 2, n + STEPS, 16), draw(3, 2, n + STEPS, 16)) for n in PROMPTS]
    for slot, (prompt, parts) in enumerate(zip(PROMPTS, texts, strict=True)):
        for layer, layer_cache in enumerate(cache.layers):
            layer_cache.prefill(slot, *(part[layer, :, :prompt] for part in parts))
        cache.start_sequence(slot, prompt)
    for step in range(STEPS):
        ends = [prompt + step for prompt in PROMPTS]
        for layer, layer_cache in enumerate(cache.layers):
            q, k, v = (
                torch.stack([text[part][layer, :, end : end + 1] for text, end in zip(texts, ends, strict=True)])
                for part in range(3)
            )
            if layer_cache.speculation_source is not None:
                layer_cache.speculate(q, ProjectQuery(lambda hidden, normed: hidden, ()), slots)
            out = layer_cache.attend(q, k, v, slots)
            assert out.dtype == torch.bfloat16
            for row, end in enumerate(ends):
                keys, values = (texts[row][part][layer, None, :, : end + 1].float() for part in (1, 2))
                expected = attention_over_rows(q[row, None].float(), keys, values)
                torch.testing.assert_close(out[row, None].float(), expected, rtol=0.02, atol=0.02)
        cache.end_step(slots)
