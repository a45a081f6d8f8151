"""The tokens that are selected by given scores, ties included: against a loop, and properties for any scores."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsecache.kernels.selection import count_within, score_margin, topk_indices
from tests.methods.infinigen.compared import select_tokens
from tests.methods.infinigen.slow import slow_select

# Few values, so that there are many ties and margins of exactly alpha; all of them are exact in float32.
shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from((1, 2, 4, 8)), st.integers(1, 24))
alphas = st.sampled_from((0.0, 0.5, 1.0, 2.0, 3.5, 100.0, math.inf))
rules = st.sampled_from(("mean", "per_head"))
seeds = st.integers(0, 10_000)


def _scores(batch: int, kv_heads: int, group: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-6, 5, (batch, kv_heads * group, length), generator=generator) / 2


def _sets(selected: Tensor) -> list[set[int]]:
    return [{t for t in head if t >= 0} for row in selected.tolist() for head in row]


@given(shapes, alphas, rules, st.lists(st.integers(1, 30), min_size=3, max_size=3), seeds)
def test_equals_the_loop(shape, alpha, rule, caps, seed) -> None:
    batch, kv_heads, _, length = shape
    scores = _scores(*shape, seed)
    lengths = torch.randint(1, length + 1, (batch,), generator=torch.Generator().manual_seed(seed)).tolist()
    for row, tokens in enumerate(lengths):
        scores[row, :, tokens:] = -torch.inf
    found = select_tokens(scores, kv_heads, alpha, torch.tensor(caps[:batch]), rule)
    for row, tokens in enumerate(lengths):
        of_heads = [of_head[:tokens] for of_head in scores[row].tolist()]
        for head, positions in enumerate(slow_select(of_heads, kv_heads, alpha, caps[row], rule)):
            assert found[row, head].tolist() == positions + [-1] * (found.shape[2] - len(positions))


@given(shapes, st.tuples(alphas, alphas), rules, st.tuples(st.integers(1, 30), st.integers(1, 30)), seeds)
def test_the_selection_grows_with_alpha_and_cap_and_stays_within_the_cap(shape, alphas, rule, caps, seed) -> None:
    scores, (few, many) = _scores(*shape, seed), sorted(caps)

    def selected(alpha: float, cap: int) -> list[set[int]]:
        return _sets(select_tokens(scores, shape[1], alpha, torch.full(shape[:1], cap), rule))

    narrow, wide, longer = selected(min(alphas), few), selected(max(alphas), few), selected(max(alphas), many)
    assert all(a <= b <= c for a, b, c in zip(narrow, wide, longer, strict=True))
    assert max(map(len, longer)) <= min(many, shape[3]) and max(map(len, wide)) <= few


@given(shapes, rules, seeds)
def test_everything_is_selected_without_limits(shape, rule, seed) -> None:
    batch, kv_heads, _, length = shape
    found = select_tokens(_scores(*shape, seed), kv_heads, math.inf, torch.full((batch,), length), rule)
    assert torch.equal(found, torch.arange(length).expand(batch, kv_heads, -1))


def test_each_head_is_compared_with_its_own_best() -> None:
    """The published code compares all heads with the first one's maximum."""
    scores = torch.tensor([[[9.0, 8.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0]]])
    assert score_margin(scores, 2).tolist() == [[[0, -1, -9, -9], [-2, -2, -1, 0]]]
    assert score_margin(scores, 1).tolist() == [[[0, -1, -1, 0]]], "a KV head takes the largest of its heads' margins"


def test_the_mean_count_is_rounded_up_and_given_to_every_head() -> None:
    margin = torch.tensor([[[0.0, -0.5, -0.5, -9.0], [0.0, -9.0, -9.0, -9.0], [0.0, -9.0, -9.0, -9.0]]])
    wide = torch.tensor([10])
    assert count_within(margin, 1.0, wide, "mean").tolist() == [[2, 2, 2]]  # ceil(5 / 3)
    assert count_within(margin, 1.0, wide, "per_head").tolist() == [[3, 1, 1]]
    assert count_within(margin[:, :1], 1.0, wide, "mean").tolist() == [[3]]
    assert count_within(margin, 1.0, torch.tensor([1]), "per_head").tolist() == [[1, 1, 1]]


def test_a_token_exactly_alpha_below_the_best_is_not_counted() -> None:
    margin = torch.tensor([[[0.0, -2.0, -1.75]]])
    counts = {alpha: int(count_within(margin, alpha, torch.tensor([9]), "mean")) for alpha in (0.0, 1.75, 2.0, 2.5)}
    assert counts == {0.0: 0, 1.75: 1, 2.0: 2, 2.5: 3}


def test_ties_go_to_the_lower_position_and_positions_ascend() -> None:
    margin = torch.tensor([[[-1.0, 0.0, -1.0, 0.0, -1.0]]])
    assert topk_indices(margin, torch.tensor([[1]])).tolist() == [[[1]]]
    assert topk_indices(margin, torch.tensor([[3]])).tolist() == [[[0, 1, 3]]]
    assert topk_indices(margin, torch.tensor([[4]])).tolist() == [[[0, 1, 2, 3]]]


@pytest.mark.parametrize("length", [100, 5000])
def test_ties_go_to_the_lower_position_in_long_rows_too(length) -> None:
    """A sort that is stable for short rows alone would pass the small tests."""
    found = topk_indices(torch.zeros(2, 3, length), torch.full((2, 3), 40))
    assert torch.equal(found, torch.arange(40).expand(2, 3, -1))


def test_a_token_of_margin_minus_infinity_is_never_selected() -> None:
    margin = torch.tensor([[[-torch.inf, -1.0, -torch.inf, 0.0], [-torch.inf] * 4]])
    assert topk_indices(margin, torch.tensor([[4, 3]])).tolist() == [[[1, 3, -1, -1], [-1] * 4]]


def test_rows_without_any_token_select_nothing() -> None:
    scores = torch.tensor([[[1.0, 2.0]], [[-torch.inf, -torch.inf]]])
    caps = torch.tensor([2, 2])
    assert select_tokens(scores, 1, math.inf, caps, "mean").tolist() == [[[0, 1]], [[-1, -1]]]
    assert select_tokens(scores[:, :, :0], 1, math.inf, caps, "mean").shape == (2, 1, 0)
