"""Oracle and Random: what they select, against a slow reference and as a distribution."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from sparsecache.methods.oracle import Oracle
from sparsecache.methods.random import Random
from tests.methods.stepping import (
    Kept,
    Text,
    budget_tokens,
    check_against,
    check_budget,
    make_cache,
    prefill,
    random_text,
    random_texts,
    shape_of,
)


def _nearest(text: Text, layer: int, budget: float) -> list[Kept]:
    """Return the past tokens whose scores come nearest to the best score of one of the KV head's queries."""
    steps = []
    for past in range(text.prompt, text.prompt + text.new):
        kept = []
        for kv in range(text.k.shape[1]):
            heads = range(kv * text.group, (kv + 1) * text.group)
            rows = [text.scores[layer][head][past][:past] for head in heads]
            margins = [max(row[at] - max(row) for row in rows) for at in range(past)]
            order = sorted(range(past), key=lambda at, margins=margins: (-margins[at], at))
            kept.append(sorted(order[: budget_tokens(budget, past)]))
        steps.append(kept)
    return steps


@pytest.mark.parametrize(("budget", "group"), [(0.2, 1), (0.3, 4), (1, 2), (7, 4), (1.0, 2), (500, 1)])
def test_the_oracle_takes_the_tokens_of_highest_true_score(budget, group) -> None:
    shape = shape_of(group)
    method = Oracle(budget=budget, dense_layers=1)
    check_against(lambda text, layer: _nearest(text, layer, budget), method, shape, random_texts(shape))


def test_of_equal_scores_the_earlier_are_taken() -> None:
    shape = shape_of(2, layers=1)
    text = random_text(shape, 21, 4, seed=1)
    text = replace(text, k=torch.ones_like(text.k))
    check_against(lambda text, layer: [[[0, 1, 2]] * 2] * 4, Oracle(budget=3, dense_layers=0), shape, [text])


@pytest.mark.parametrize("budget", [0.02, 0.3, 1.0, 13, 64])
def test_random_takes_the_whole_budget_and_no_more(budget) -> None:
    shape = shape_of(2)
    method, most = Random(budget=budget, dense_layers=0), lambda text, past: budget_tokens(budget, past)
    check_budget(method, shape, random_texts(shape), most)
    cache = make_cache(method, shape, 1, 100, 10)
    prefill(cache, 0, random_text(shape, 90, 1, seed=0))
    counts = method.select(torch.zeros(1, 4, 1, 6), cache.layers[0], torch.tensor([0])).counts
    assert counts.tolist() == [[min(90, budget_tokens(budget, 90))] * 2]


def _drawn(seed: int, lengths: range) -> list[list[list[int]]]:
    """Return the positions that Random selects of each length: [lengths][G][N]."""
    shape = shape_of(2, layers=1)
    method = Random(budget=0.25, dense_layers=0, seed=seed)
    cache = make_cache(method, shape, 1, lengths.stop, 1)
    text, slots = random_text(shape, lengths.stop, 0, seed=0), torch.tensor([0])
    prefill(cache, 0, text)
    found = []
    for past in lengths:
        cache.start_sequence(0, past)
        found.append(method.select(torch.zeros(1, 4, 1, 6), cache.layers[0], slots).positions[0].tolist())
    return found


def test_random_draws_every_position_equally_often_and_anew_for_each_length_head_and_seed() -> None:
    lengths = range(200, 600)
    draws = _drawn(0, lengths)
    assert draws == _drawn(0, lengths)
    assert draws[:5] != _drawn(1, lengths)[:5]
    assert all(first != second for first, second in draws)
    for tenth in range(10):  # a tenth of the positions gets a tenth of the draws
        shares = [
            sum(1 for at in of_head if tenth <= 10 * at / past < tenth + 1) / len(of_head)
            for past, of_length in zip(lengths, draws, strict=True)
            for of_head in of_length
        ]
        assert abs(sum(shares) / len(shares) - 0.1) < 0.005
    overlap = [len({*a[0]} & {*b[0]}) / len(a[0]) for a, b in pairwise(draws)]
    assert abs(sum(overlap) / len(overlap) - 0.25) < 0.02  # as of independent draws
