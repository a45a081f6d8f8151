"""LagKV against kvpress on the same keys and values."""

import pytest
import torch

from sparsecache.methods.lagkv import LagKV
from tests.methods.presses import kept_by_method, kept_by_press, press_arguments, random_prompt


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("length", "lag", "sinks"), [(131, 16, 4), (64, 7, 0), (33, 8, 16), (100, 2, 3), (40, 20, 0)])
def test_scores_and_kept_tokens_are_those_of_kvpress(length, lag, sinks, group, kvpress) -> None:
    q, k, v = random_prompt(length, group)
    parts = (length - sinks) // lag - 1
    first, last = sinks, sinks + parts * lag

    def press(count: int):
        return kvpress("lagkv_press").LagKVPress(1 - (count + 0.5) / length, sinks, lag)

    scores = LagKV(lag=lag, sinks=sinks).score(q, k, v)
    expected = press(length // 2).score(*press_arguments(q, k, v))[0]
    torch.testing.assert_close(scores[:, first:last], expected[:, first:last])
    assert (scores[:, :first] > 1).all() and (scores[:, last:] > 1).all()
    for per_part in {1, lag // 2, lag - 1} - {0}:  # ranks of partitions tie, so that each gives up as many
        count = length - parts * (lag - per_part)
        if count < length:
            kept = kept_by_method(LagKV(budget=count, lag=lag, sinks=sinks, dense_layers=0), q, k, v)
            assert kept == kept_by_press(press(count), q, k, v)


@pytest.mark.parametrize("length", [30, 131])
def test_a_budget_below_sinks_and_last_partition_keeps_sinks_and_the_last_tokens(length) -> None:
    """So does a prompt without two partitions, as in kvpress."""
    q, k, v = random_prompt(length, 2)
    for budget, expected in ((3, [0, 1, 2]), (9, [0, 1, 2, 3, *range(length - 5, length)])):
        assert kept_by_method(LagKV(budget=budget, lag=16, sinks=4, dense_layers=0), q, k, v) == [expected] * 2


def test_a_constant_channel_gives_finite_scores() -> None:
    q, k, v = random_prompt(100, 1)
    k[..., 3], v[..., 5] = 2.0, 0.0
    assert LagKV(lag=16, sinks=4).score(q, k, v)[:, 4:68].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lag": 1}, r"^lag=1 must be 2 tokens or more\.$"), ({"sinks": -1}, r"^sinks=-1 must be 0 tokens or more\.$")],
)
def test_options_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        LagKV(**options)
