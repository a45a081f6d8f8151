"""TOVA against kvpress at the prompt, and against attention counted one head and token at a time while decoding."""

import pytest
import torch

from sparsecache.cache.base import Shape
from sparsecache.cache.model_cache import ModelCache
from sparsecache.methods.tova import TOVA
from tests.methods.presses import (
    HEAD_DIM,
    LENGTHS,
    kept_by_method,
    kept_by_press,
    random_prompt,
)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_keeps_what_kvpress_keeps(length, group, kvpress) -> None:
    q, k, v = random_prompt(length, group)
    for count in {1, 2, length // 3, length - 1}:
        press = kvpress("tova_press").TOVAPress(compression_ratio=1 - (count + 0.5) / length)
        found = kept_by_method(TOVA(budget=max(2, count), dense_layers=0), q, k, v)
        if count > 1:
            assert found == kept_by_press(press, q, k, v)
        assert {len(of_head) for of_head in found} == {max(2, count)}


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("budget", [2, 9, 0.3, 0.02])
@torch.inference_mode()
def test_a_step_evicts_the_token_with_the_least_attention_of_all_heads(budget, group) -> None:
    prompt, steps = 40, 12
    q, k, v = random_prompt(prompt + steps, group)
    shape = Shape(1, len(q), len(k), HEAD_DIM)
    cache = ModelCache(TOVA(budget=budget, dense_layers=0), shape, [torch.device("cpu")], 2, 60, 12, torch.float32)
    layer, slot = cache.layers[0], torch.tensor([1])
    layer.prefill(1, q[:, :prompt], k[:, :prompt], v[:, :prompt])
    cache.start_sequence(1, prompt)
    kept = layer.positions[1, 0, : layer.num_tokens[1, 0]].tolist()
    keys = k.repeat_interleave(group, 0)
    for at in range(prompt, prompt + steps):
        kept.append(at)
        attention = (q[:, at, None] @ keys[:, kept].mT / HEAD_DIM**0.5).softmax(-1).sum((0, 1)).tolist()
        if len(kept) > (max(1, int(budget * (at + 1) + 1e-6)) if budget <= 1 else budget):
            kept.remove(min(kept[:-1], key=lambda position, kept=kept, sums=attention: sums[kept.index(position)]))
        layer.attend(q[None, :, at, None], k[None, :, at, None], v[None, :, at, None], slot)
        cache.end_step(slot)
        for found, count in zip(layer.positions[1], layer.num_tokens[1].tolist(), strict=True):
            assert sorted(found[:count].tolist()) == sorted(kept)
