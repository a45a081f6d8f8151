"""Which tokens are chosen from given scores, against the loop, ties included; and what must hold for any scores."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsecache.kernels.selection import count_near, distance_to_best, highest, select

# Few values, so that there are many ties and distances of just alpha; all of them are exact in float32.
shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from((1, 2, 4, 8)), st.integers(1, 24))
alphas = st.sampled_from((0.0, 0.5, 1.0, 2.0, 3.5, 100.0, math.inf))
fetches = st.sampled_from(("mean", "per_head"))
seeds = st.integers(0, 10_000)


def _scores(batch: int, kv_heads: int, group: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-6, 5, (batch, kv_heads * group, length), generator=generator) / 2


def _chosen(found: Tensor) -> list[list[set[int]]]:
    return [[{t for t in head if t >= 0} for head in row] for row in found.tolist()]


@given(shapes, alphas, fetches, st.lists(st.integers(1, 30), min_size=3, max_size=3), seeds)
def test_equals_the_loop(slow_selection, shape, alpha, fetch, caps, seed) -> None:
    batch, kv_heads, _, length = shape
    scores = _scores(*shape, seed)
    held = torch.randint(1, length + 1, (batch,), generator=torch.Generator().manual_seed(seed)).tolist()
    for row, tokens in enumerate(held):  # rows of a batch are not equally long
        scores[row, :, tokens:] = -torch.inf
    found = select(scores, kv_heads, alpha, torch.tensor(caps[:batch]), fetch)
    for row, tokens in enumerate(held):
        by_position = [dict(enumerate(of_head[:tokens])) for of_head in scores[row].tolist()]
        expected = slow_selection(by_position, kv_heads, alpha, caps[row], fetch)
        for head, positions in enumerate(expected):
            assert found[row, head].tolist() == positions + [-1] * (found.shape[2] - len(positions))


@given(shapes, alphas, fetches, st.integers(1, 30), seeds)
def test_never_more_than_the_cap(shape, alpha, fetch, cap, seed) -> None:
    found = select(_scores(*shape, seed), shape[1], alpha, torch.full(shape[:1], cap), fetch)
    assert (found >= 0).sum(2).max() <= min(cap, shape[3])


@given(shapes, alphas, alphas, fetches, st.integers(1, 30), seeds)
def test_the_selection_grows_with_alpha(shape, first, second, fetch, cap, seed) -> None:
    scores, caps = _scores(*shape, seed), torch.full(shape[:1], cap)
    narrow, wide = (_chosen(select(scores, shape[1], a, caps, fetch)) for a in sorted((first, second)))
    assert all(a <= b for rows in zip(narrow, wide, strict=True) for a, b in zip(*rows, strict=True))


@given(shapes, alphas, fetches, st.integers(1, 30), st.integers(1, 30), seeds)
def test_the_selection_grows_with_the_cap(shape, alpha, fetch, first, second, seed) -> None:
    scores = _scores(*shape, seed)
    few, many = (
        _chosen(select(scores, shape[1], alpha, torch.full(shape[:1], cap), fetch)) for cap in sorted((first, second))
    )
    assert all(a <= b for rows in zip(few, many, strict=True) for a, b in zip(*rows, strict=True))


@given(shapes, fetches, seeds)
def test_everything_is_chosen_without_limits(shape, fetch, seed) -> None:
    batch, kv_heads, _, length = shape
    found = select(_scores(*shape, seed), kv_heads, math.inf, torch.full((batch,), length), fetch)
    assert torch.equal(found, torch.arange(length).expand(batch, kv_heads, -1))


def test_each_head_is_measured_against_its_own_best() -> None:
    """The published code measures all heads against the first one's maximum."""
    scores = torch.tensor([[[9.0, 8.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0]]])
    assert distance_to_best(scores, 2).tolist() == [[[0, -1, -9, -9], [-2, -2, -1, 0]]]
    assert distance_to_best(scores, 1).tolist() == [[[0, -1, -1, 0]]], "a KV head takes the nearest of its heads"


def test_the_mean_count_is_rounded_up_and_given_to_every_head() -> None:
    distance = torch.tensor([[[0.0, -0.5, -0.5, -9.0], [0.0, -9.0, -9.0, -9.0], [0.0, -9.0, -9.0, -9.0]]])
    wide = torch.tensor([10])
    assert count_near(distance, 1.0, wide, "mean").tolist() == [[2, 2, 2]]  # ceil(5 / 3)
    assert count_near(distance, 1.0, wide, "per_head").tolist() == [[3, 1, 1]]
    assert count_near(distance[:, :1], 1.0, wide, "mean").tolist() == [[3]]
    assert count_near(distance, 1.0, torch.tensor([1]), "per_head").tolist() == [[1, 1, 1]]


def test_a_token_just_alpha_away_is_not_near() -> None:
    distance = torch.tensor([[[0.0, -2.0, -1.75]]])
    counts = {alpha: int(count_near(distance, alpha, torch.tensor([9]), "mean")) for alpha in (0.0, 1.75, 2.0, 2.5)}
    assert counts == {0.0: 0, 1.75: 1, 2.0: 2, 2.5: 3}


def test_ties_go_to_the_lower_position_and_positions_rise() -> None:
    distance = torch.tensor([[[-1.0, 0.0, -1.0, 0.0, -1.0]]])
    assert highest(distance, torch.tensor([[1]])).tolist() == [[[1]]]
    assert highest(distance, torch.tensor([[3]])).tolist() == [[[0, 1, 3]]]
    assert highest(distance, torch.tensor([[4]])).tolist() == [[[0, 1, 2, 3]]]


def test_what_cannot_be_chosen_is_not_whatever_the_count() -> None:
    distance = torch.tensor([[[-torch.inf, -1.0, -torch.inf, 0.0], [-torch.inf] * 4]])
    assert highest(distance, torch.tensor([[4, 3]])).tolist() == [[[1, 3, -1, -1], [-1] * 4]]


@pytest.mark.parametrize("length", [100, 5000])
def test_ties_go_to_the_lower_position_in_long_rows_too(length) -> None:
    """A sort that is only stable for short rows would pass the small tests."""
    distance = torch.zeros(2, 3, length)
    found = highest(distance, torch.full((2, 3), 40))
    assert torch.equal(found, torch.arange(40).expand(2, 3, -1))


def test_rows_without_any_token_choose_nothing() -> None:
    scores = torch.tensor([[[1.0, 2.0]], [[-torch.inf, -torch.inf]]])
    assert select(scores, 1, math.inf, torch.tensor([2, 2]), "mean").tolist() == [[[0, 1]], [[-1, -1]]]
    assert select(scores[:, :, :0], 1, math.inf, torch.tensor([2, 2]), "mean").shape == (2, 1, 0)
