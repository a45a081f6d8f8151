"""SnapKV and Ada-KV against kvpress on the same tensors. kvpress pools by the average alone."""

import pytest
import torch

from sparsecache.cache.base import Shape
from sparsecache.cache.model_cache import ModelCache
from sparsecache.methods.adakv import AdaKV
from sparsecache.methods.snapkv import SnapKV
from tests.methods.presses import (
    LENGTHS,
    kept_by_method,
    kept_by_press,
    press_arguments,
    random_prompt,
)

OPTIONS = {"window": 3, "kernel": 5, "pooling": "average", "dense_layers": 0}


def _press(kvpress, length: int, count: int):
    return kvpress("snapkv_press").SnapKVPress(1 - (count + 0.5) / length, 3, 5)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_snapkv_scores_and_keeps_as_kvpress(length, group, kvpress) -> None:
    q, k, v = random_prompt(length, group)
    scores = SnapKV(**OPTIONS).score(q, k, v)[:, :-3] / (3 * group)  # kvpress takes means, not sums
    torch.testing.assert_close(scores, _press(kvpress, length, 3).score(*press_arguments(q, k, v))[0, :, :-3])
    for count in {max(3, length // 2), 4, length - 1}:
        expected = kept_by_press(_press(kvpress, length, count), q, k, v)
        assert kept_by_method(SnapKV(budget=count, **OPTIONS), q, k, v) == expected


@pytest.mark.parametrize("safeguard", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_heads_share_a_budget_as_in_kvpress(length, group, safeguard, kvpress) -> None:
    q, k, v = random_prompt(length, group)
    q = q * torch.linspace(0.2, 3, len(q))[:, None, None]  # heads of unlike sharpness
    for count in {max(3, length // 3), length // 2 + 1, length - 1}:
        press = kvpress("adakv_press").AdaKVPress(_press(kvpress, length, count), safeguard)
        module, *arguments = press_arguments(q, k, v)
        press.compress(module, *arguments)
        is_kept = torch.ones(k.shape[:2], dtype=torch.bool)
        is_kept[module.masked_key_indices[1:]] = False
        found = kept_by_method(AdaKV(budget=count, safeguard=safeguard, **OPTIONS), q, k, v)
        assert found == [of_head.nonzero().flatten().tolist() for of_head in is_kept]
        counts = [len(of_head) for of_head in found]
        assert sum(counts) == count * len(k) and min(counts) >= max(1, int(safeguard * count))


def test_a_head_of_spread_attention_keeps_more() -> None:
    q, k, v = random_prompt(131, 1)
    q = q * torch.tensor([0.01, 9, 9, 9])[:, None, None]
    counts = [len(of_head) for of_head in kept_by_method(AdaKV(budget=40, **OPTIONS), q, k, v)]
    assert counts[0] > 2 * max(counts[1:]) and min(counts) >= 8


@pytest.mark.parametrize("budget", [2, 40, 0.1, 1.0])
@torch.inference_mode()
def test_attention_is_over_each_heads_own_tokens_and_the_new_ones(budget) -> None:
    """New tokens overwrite the rows behind the tokens that a KV head keeps; the widest head has capacity for all."""
    length, new = 64, 9
    q, k, v = random_prompt(length + new, 2)
    q = q * torch.tensor([0.1, 0.1, 6, 6])[:, None, None]
    prompt = [x[:, :length] for x in (q, k, v)]
    method = AdaKV(budget=budget, **OPTIONS)
    kept = kept_by_method(method, *prompt)
    shape = Shape(1, len(q), len(k), q.shape[2])
    cache = ModelCache(method, shape, [torch.device("cpu")], 2, length + new, new, torch.float32)
    layer, slots = cache.layers[0], torch.tensor([1])
    layer.prefill(1, *prompt)
    cache.start_sequence(1, length)
    for at in range(length, length + new):
        found = layer.attend(*(x[None, :, at, None] for x in (q, k, v)), slots)[0, :, 0]
        cache.end_step(slots)
        for head in range(len(q)):
            positions = [*kept[head // 2], *range(length, at + 1)]
            weights = (q[head, at] @ k[head // 2, positions].T / q.shape[2] ** 0.5).softmax(0)
            torch.testing.assert_close(found[head], weights @ v[head // 2, positions])
    shares = [(len(of_head) + at) / (length + at) for of_head in kept for at in range(new)]
    assert cache.report(1)["kept"] == pytest.approx(sum(shares) / len(shares))


def test_a_safeguard_out_of_range_is_refused() -> None:
    for value in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"^safeguard={value} must be a share from 0 to 1\.$"):
            AdaKV(safeguard=value)
