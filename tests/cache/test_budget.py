"""Budgets against fractions."""

from fractions import Fraction
from math import floor

import pytest
import torch

from sparsecache.cache.budget import Budget

CPU = torch.device("cpu")


@pytest.mark.parametrize("share", ["1", "0.2", "0.1", "0.3", "0.7", "0.025", "0.001", "1e-9", "0.29", "0.57"])
def test_a_share_is_rounded_down_exactly_and_leaves_one_token(share) -> None:
    """Fractions are exact: 0.29 * 100 is 28.999999999999996 in floating point, and 29 tokens all the same."""
    budget = Budget(float(share))
    for past in (*range(300), 1000, 4096, 10**5, 131072):
        assert budget.tokens(past) == max(1, floor(Fraction(share) * past))


@pytest.mark.parametrize("count", [2, 3.0, 64, 10**30])
def test_a_count_is_the_same_for_every_length(count) -> None:
    assert {Budget(count).tokens(past) for past in (0, 1, 63, 10**6)} == {min(count, 2**62)}


@pytest.mark.parametrize("amount", [0.05, 0.2, 1.0, 7, 10**30])
def test_a_table_holds_the_tokens_of_each_length_and_never_falls(amount) -> None:
    table = Budget(amount).table(500, CPU)
    assert table.dtype == torch.int64
    assert table.tolist() == [Budget(amount).tokens(past) for past in range(501)]
    assert (table.diff() >= 0).all()


@pytest.mark.parametrize("amount", [0, -1, -0.2, 1.5, 2.25, float("inf"), float("nan"), -float("inf")])
def test_other_amounts_are_refused_with_the_value(amount) -> None:
    with pytest.raises(ValueError, match=rf"^budget={amount} must be a share above 0 up to 1, or a whole number"):
        Budget(amount)
