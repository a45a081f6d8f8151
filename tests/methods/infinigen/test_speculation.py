"""Partial keys: which columns are chosen, what a row of them holds, and the scores that they give."""

import math
from collections.abc import Callable

import pytest
import torch
from sparsecache.methods.infinigen.speculation import PartialKeys
from torch import Tensor

from sparsecache.cache.base import Shape
from sparsecache.kernels.scores import scaled_scores
from sparsecache.methods.infinigen.skewing import skewing_matrix

CPU = torch.device("cpu")
SHAPES = [(2, 2, 32), (4, 2, 64), (4, 1, 128), (8, 1, 32), (8, 2, 16)]
every_shape = pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)


@pytest.fixture
def make_partial() -> Callable[..., PartialKeys]:
    def make(heads: int, kv_heads: int, head_dim: int, columns: int, *, skewed: bool = True) -> PartialKeys:
        queries = torch.randn(kv_heads, heads // kv_heads, 99, head_dim)
        matrices = skewing_matrix(queries) if skewed else torch.eye(head_dim).expand(kv_heads, -1, -1)
        shape = Shape(2, heads, kv_heads, head_dim)
        return PartialKeys(torch.stack([matrices.flip(0), matrices]), columns, 3, 20, shape, [CPU, CPU], torch.float32)

    return make


def _columns_of(partial: PartialKeys, kv: int) -> list[int]:
    return partial.columns[1, 2, kv].tolist()


@every_shape
def test_the_columns_are_those_with_the_largest_sum_over_queries_and_keys(
    heads, kv_heads, head_dim, make_partial
) -> None:
    partial = make_partial(heads, kv_heads, head_dim, head_dim // 4)
    q, k = torch.randn(heads, 9, head_dim), torch.randn(kv_heads, 9, head_dim)
    partial.fill(1, 2, q, k)
    group, matrices = heads // kv_heads, partial._matrices[1]
    for kv in range(kv_heads):
        sums = [0.0] * head_dim
        for row in [*q[kv * group : (kv + 1) * group].flatten(0, 1), *k[kv]]:
            sums = [total + abs(value) for total, value in zip(sums, (row @ matrices[kv]).tolist(), strict=True)]
        best = sorted(range(head_dim), key=lambda column: -sums[column])[: head_dim // 4]
        assert sorted(_columns_of(partial, kv)) == sorted(best)


def test_queries_and_keys_both_count_and_every_head_of_a_group(make_partial) -> None:
    q, k = torch.zeros(4, 6, 8), torch.zeros(2, 6, 8)
    q[1, :, 5] = 3.0  # a head that is not the first of its group
    q[2, :, 1], q[3, :, 1] = 2.0, -2.0  # two heads, which must not cancel out
    k[0, 0, 2], k[0, 1, 2] = 9.0, -9.0  # nor two tokens
    k[1, :, 7] = 5.0
    q[2, :, 0] = 1.0
    partial = make_partial(4, 2, 8, 2, skewed=False)
    partial.fill(1, 2, q, k)
    assert [sorted(_columns_of(partial, kv)) for kv in range(2)] == [[2, 5], [1, 7]]
    assert partial.columns[0].eq(0).all() and partial.columns[1, :2].eq(0).all(), "other layers and slots"


def test_equally_good_columns_are_taken_from_the_first_on(make_partial) -> None:
    partial = make_partial(2, 1, 8, 3, skewed=False)
    partial.fill(1, 2, torch.ones(2, 4, 8), torch.ones(1, 4, 8))
    assert _columns_of(partial, 0) == [0, 1, 2]


@every_shape
def test_scores_of_all_columns_are_the_true_scores(heads, kv_heads, head_dim, make_partial) -> None:
    """The rotation cancels out, and what is left is q k / sqrt(d)."""
    partial = make_partial(heads, kv_heads, head_dim, head_dim)
    q, k, asked = (
        torch.randn(n, rows, head_dim) for n, rows in ((heads, 7), (kv_heads, 7), (heads, 1))
    )  # fmt: skip
    partial.keep(1, 2, partial.fill(1, 2, q, k))
    found = partial.scores(1, torch.tensor([2]), asked[None], 7)[0]
    assert found.dtype == torch.float32
    for head in range(heads):
        true = k[head * kv_heads // heads] @ asked[head, 0] / math.sqrt(head_dim)
        torch.testing.assert_close(found[head], true, rtol=1e-4, atol=1e-4)


@every_shape
def test_scores_of_some_columns_are_those_columns_alone(heads, kv_heads, head_dim, make_partial) -> None:
    partial = make_partial(heads, kv_heads, head_dim, head_dim // 4)
    q, k, asked = (
        torch.randn(heads, 7, head_dim),
        torch.randn(kv_heads, 7, head_dim),
        torch.randn(1, heads, 1, head_dim),
    )
    partial_k = partial.fill(1, 2, q, k)
    partial_q = partial.of(1, 2, q)
    partial.keep(1, 2, partial_k)
    found = partial.scores(1, torch.tensor([2]), asked, 7)[0]
    for head in range(heads):
        kv = head * kv_heads // heads
        columns, matrix = _columns_of(partial, kv), partial._matrices[1, kv]
        some = (k[kv] @ matrix)[:, columns]
        torch.testing.assert_close(partial_k[kv], some)
        torch.testing.assert_close(partial_q[head], (q[head] @ matrix)[:, columns])
        expected = some @ (asked[0, head, 0] @ matrix)[columns] / math.sqrt(head_dim)
        torch.testing.assert_close(found[head], expected, rtol=1e-4, atol=1e-4)


def test_a_new_token_takes_its_row_of_each_head_and_no_other(make_partial) -> None:
    partial = make_partial(4, 2, 16, 4)
    for slot in range(3):
        partial.keep(1, slot, partial.fill(1, slot, torch.randn(4, 9, 16), torch.randn(2, 9, 16)))
    before, k = partial.keys.clone(), torch.randn(2, 2, 1, 16)
    slots, rows = torch.tensor([2, 0]), torch.tensor([[9, 3], [0, 19]])
    partial.put(1, slots, rows, k)
    for row, slot in enumerate(slots.tolist()):
        for kv in range(2):
            at = int(rows[row, kv])
            columns = partial.columns[1, slot, kv]
            torch.testing.assert_close(
                partial.keys[1, slot, kv, at], (k[row, kv, 0] @ partial._matrices[1, kv])[columns]
            )
            before[1, slot, kv, at] = partial.keys[1, slot, kv, at]
    assert torch.equal(partial.keys, before)


@pytest.mark.parametrize("batch", [(), (3,)])
@every_shape
def test_scaled_scores_equal_the_loop(heads, kv_heads, head_dim, batch) -> None:
    q, k = torch.randn(*batch, heads, 2, 5), torch.randn(*batch, kv_heads, 6, 5)
    found = scaled_scores(q, k, head_dim)
    assert found.shape == (*batch, heads, 2, 6)
    flat_q, flat_k, flat = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, found))

    def score(at: int, head: int, query: int, key: int) -> Tensor:
        return flat_q[at, head, query] @ flat_k[at, head * kv_heads // heads, key] / head_dim**0.5

    for at in range(len(flat)):
        for head in range(heads):
            expected = torch.stack([torch.stack([score(at, head, i, j) for j in range(6)]) for i in range(2)])
            torch.testing.assert_close(flat[at, head], expected, rtol=1e-4, atol=1e-4)
