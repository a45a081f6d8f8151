"""Top-p against probabilities that are added one at a time, in float64."""

import math
from dataclasses import replace

import pytest
import torch

from sparsecache.methods.topp import TopP
from tests.methods.stepping import (
    Kept,
    Text,
    budget_tokens,
    check_against,
    check_budget,
    probabilities,
    random_text,
    random_texts,
    run,
    shape_of,
)


def _kept(text: Text, layer: int, budget: float, p: float) -> list[Kept]:
    ends = range(text.prompt, text.prompt + text.new)
    kv_heads = range(text.k.shape[1])
    return [[_selected(text, layer, kv, past, budget_tokens(budget, past), p) for kv in kv_heads] for past in ends]


def _selected(text: Text, layer: int, kv: int, past: int, budget: int, p: float) -> list[int]:
    best = [0.0] * past  # the highest probability in a head that needs the token
    for head in range(kv * text.group, (kv + 1) * text.group):
        of_head = probabilities(text, layer, head, past, list(range(past)))
        total = 0.0
        for position in sorted(range(past), key=lambda position: -of_head[position]):
            if total < p or p == 1:
                best[position] = max(best[position], of_head[position])
            total += of_head[position]
    needed = [position for position in range(past) if best[position] > 0]
    return sorted(sorted(needed, key=lambda position: (-best[position], position))[:budget])


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("budget", "p"), [(1.0, 0.85), (1.0, 0.3), (0.2, 0.95), (7, 0.5), (1, 0.9), (1.0, 1.0)])
def test_tokens_are_added_until_they_make_the_share(budget, p, group) -> None:
    shape = shape_of(group)
    texts = random_texts(shape)
    check_against(lambda text, layer: _kept(text, layer, budget, p), TopP(budget, 1, p), shape, texts)


def test_the_selected_tokens_make_the_share_for_every_query_head_and_no_fewer_would() -> None:
    shape = shape_of(1)
    texts = random_texts(shape)
    for text, found in zip(texts, run(TopP(1.0, 0, 0.6), shape, texts), strict=True):
        for at in range(text.new):
            for head in range(4):
                falling = sorted(probabilities(text, 1, head, text.prompt + at, list(range(text.prompt + at))))[::-1]
                count = found.attended[1][at][head]
                assert sum(falling[:count]) >= 0.6 - 1e-5 and sum(falling[: count - 1]) < 0.6 + 1e-5


def test_the_count_follows_how_concentrated_the_attention_is() -> None:
    """With equal keys every token counts alike; with one key along the query, that token is all."""
    shape = shape_of(4, layers=1)
    text = random_text(shape, 40, 1, seed=1)
    flat = replace(text, k=torch.ones_like(text.k))
    peaked = replace(text, q=torch.ones_like(text.q), k=torch.zeros_like(text.k))
    peaked.k[:, :, 11] = 20.0
    for each, kept in ((flat, list(range(20))), (peaked, [11])):
        method = TopP(1.0, 0, p=0.49)
        check_against(lambda text, layer, kept=kept: [[kept]], method, shape, [each])


@pytest.mark.parametrize("budget", [0.02, 1.0, 1, 13])
def test_never_more_than_the_budget_is_attended_to(budget) -> None:
    shape = shape_of(2)
    method = TopP(budget, 0, 0.99)
    check_budget(method, shape, random_texts(shape), lambda text, past: budget_tokens(budget, past))


@pytest.mark.parametrize("p", [0, -0.1, 1.01, math.nan])
def test_a_share_out_of_range_is_refused(p) -> None:
    with pytest.raises(ValueError, match=rf"^p={p} must be above 0 and at most 1\.$"):
        TopP(p=p)
