"""Buckets show means over datasets per length of the prompt, with the intervals of a mean of means."""

from collections.abc import Callable

import numpy
import pytest

from sparsecache.longbench.score_types import RunScore
from tests.longbench.plots.drawing import draw, error_bar_ends, legend


def test_buckets_show_means_over_datasets(scored_by_length: Callable[..., RunScore]) -> None:
    one = scored_by_length("one", qasper=[("y", 10), ("n", 10), ("y", 9000)], trec=[("n", 10)], hotpotqa=[("h", 5000)])
    two = scored_by_length("two", qasper=[("n", 10), ("n", 10), ("h", 9000)], trec=[("y", 10)], hotpotqa=[("y", 5000)])
    plot = draw("buckets", one, two)
    (axis,) = plot.figure.axes
    first, second = (each[0].get_ydata() for each in axis.containers)
    assert list(first) == [25.0, 66.67, 100.0]  # (50 + 0) / 2
    assert list(second) == [50.0, 100.0, 66.67]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0-4k", "4-8k", "8k+"]
    assert legend(plot) == ["one", "two"]
    assert all(each[0].get_xdata()[1] == pytest.approx(1, abs=0.1) for each in axis.containers)


def test_bucket_intervals_are_those_of_a_mean_of_means(scored_by_length: Callable[..., RunScore]) -> None:
    letters = {"qasper": "ynyy" * 3, "hotpotqa": "nnyh" * 3}
    run = scored_by_length("one", **{name: [(letter, 10) for letter in text] for name, text in letters.items()})
    (axis,) = draw("buckets", run).figure.axes
    values = [[{"y": 1, "n": 0, "h": 2 / 3}[letter] for letter in text] for text in letters.values()]
    errors = [100 * numpy.std(each, ddof=1) / 12**0.5 for each in values]
    reach = 1.96 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2
    (ends,) = error_bar_ends(axis, 1)
    assert numpy.allclose(ends[0], [max(58.33 - reach, 0), min(58.33 + reach, 100)], atol=0.01)


def test_buckets_without_rows_are_left_out(scored_by_length: Callable[..., RunScore]) -> None:
    (axis,) = draw("buckets", scored_by_length("one", qasper=[("y", 10), ("n", 8000)])).figure.axes
    assert list(axis.containers[0][0].get_xdata()) == [0, 2]
