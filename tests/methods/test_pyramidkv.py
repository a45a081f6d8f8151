"""PyramidKV's budgets per layer against kvpress', its scores and kept tokens against SnapKV's of kvpress."""

import pytest
import torch

from sparsecache.cache.base import Shape
from sparsecache.methods.pyramidkv import PyramidKV
from tests.methods.presses import (
    LENGTHS,
    attention_module,
    kept_by_layers,
    press_arguments,
    random_prompt,
)

SHAPE = Shape(9, 4, 2, 16)


def _budgets(method: PyramidKV, past: int, layers: range = range(9)) -> list[int]:
    return [method.layer_budget(layer, SHAPE).tokens(past) for layer in layers]


@pytest.mark.parametrize("beta", [1, 3, 20])
@pytest.mark.parametrize("window", [1, 8, 32])
def test_budgets_are_those_of_kvpress_beside_the_window(window, beta, kvpress) -> None:
    """kvpress counts the window within a layer's share of the pyramid; the authors add it, as this project does."""
    q, k, _ = random_prompt(5, 2)
    compared = 0
    for past in (65, 200, 1001, 5000):
        for budget in (40, 100, 333, 900):
            voted = budget - window
            if not 0 < voted < past - window:
                continue
            press = kvpress("pyramidkv_press").PyramidKVPress(1 - voted / past, window, 7, beta)
            if voted / beta < window or 2 * voted - (past - window) < window:
                continue  # kvpress falls back to the same budget in all layers
            modules = [attention_module(q, k, layer, 9) for layer in range(9)]
            expected = [window + press.get_layer_budget(module, past) for module in modules]
            assert _budgets(PyramidKV(budget=budget, window=window, beta=beta, dense_layers=0), past) == expected
            compared += 1
    assert compared or (window, beta) in ((32, 20), (32, 3))


@pytest.mark.parametrize("budget", [0.05, 0.2, 0.5, 0.77, 1.0, 3, 9, 64, 1000])
@pytest.mark.parametrize("dense_layers", [0, 2, 7])
def test_budgets_fall_from_layer_to_layer_and_add_up(budget, dense_layers) -> None:
    method = PyramidKV(budget=budget, dense_layers=dense_layers)
    sparse = range(dense_layers, 9)
    mean = method.layer_budget(8, Shape(9, 4, 2, 16))
    for past in (1, 7, 40, 131, 1000, 4003):
        found = _budgets(method, past, sparse)
        total = min(past, int(budget * past + 1e-6) or 1 if budget <= 1 else budget) * len(sparse)
        assert sum(found) == total
        assert found == sorted(found, reverse=True) and found[-1] >= 1 and found[0] <= past
        assert all(
            method.layer_budget(layer, SHAPE).maximum(past) >= tokens
            for layer, tokens in zip(sparse, found, strict=True)
        )
    assert mean.table(50, torch.device("cpu")).tolist() == [mean.tokens(past) for past in range(51)]


@pytest.mark.parametrize(("budget", "window"), [(0.05, 8), (0.33, 1), (1.0, 8), (3, 8), (64, 32), (1000, 8)])
def test_the_tokens_of_one_length_are_those_of_the_table(budget, window) -> None:
    method = PyramidKV(budget=budget, window=window, dense_layers=0)
    for layer in range(9):
        tokens = method.layer_budget(layer, SHAPE)
        assert tokens.table(1500, torch.device("cpu")).tolist() == [tokens.tokens(past) for past in range(1501)]


def test_the_last_layer_gets_a_share_of_the_mean() -> None:
    first, last = (_budgets(PyramidKV(budget=208, dense_layers=0), 5000)[layer] for layer in (0, -1))
    assert (first, last) == (8 + 390, 8 + 10)  # 200 voted in the mean, 200 / beta in the last layer
    assert _budgets(PyramidKV(budget=208, beta=1, dense_layers=0), 5000) == [208] * 9


def test_one_sparse_layer_gets_the_whole_budget() -> None:
    assert PyramidKV(budget=100, dense_layers=8).layer_budget(8, SHAPE).tokens(1000) == 100


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_each_layer_keeps_the_tokens_of_highest_score_of_kvpress(length, group, kvpress) -> None:
    layers, window = 5, min(8, length - 1)
    q, k, v = random_prompt(length, group)
    method = PyramidKV(budget=max(2, length // 3), window=window, kernel=5, pooling="average", dense_layers=1)
    press = kvpress("pyramidkv_press").PyramidKVPress(0.5, window, 5)
    scores = press.score(*press_arguments(q, k, v))[0]
    scores[:, length - window :] += torch.arange(window)  # a budget below the window keeps its last tokens
    found = kept_by_layers(method, q, k, v, layers)
    shape = Shape(layers, len(q), len(k), q.shape[2])
    assert found[0] == [list(range(length))] * len(k)
    for layer in range(1, layers):
        count = method.layer_budget(layer, shape).tokens(length)
        assert found[layer] == scores.topk(count, dim=-1).indices.sort().values.tolist()


@pytest.mark.parametrize("budget", [30, 0.3])
def test_rows_are_allocated_for_any_prompt(budget) -> None:
    """The caches of a pyramid take prompts of every length up to the longest."""
    for length in range(1, 130, 3):
        q, k, v = random_prompt(length, 4)
        for layer, kept in enumerate(kept_by_layers(PyramidKV(budget=budget, dense_layers=0), q, k, v, 3)):
            budgets = PyramidKV(budget=budget, dense_layers=0).layer_budget(layer, Shape(3, 4, 1, 16))
            assert len(kept[0]) == min(budgets.tokens(length), length)


def test_a_beta_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^beta=0 must be 1 or more \(1: the same budget in all layers\)\.$"):
        PyramidKV(beta=0)
