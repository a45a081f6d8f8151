"""Intervals of comparisons: they equal a plain loop and known distributions, and cover the true difference."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy
import pytest

from sparsecache.longbench.baseline import make_baseline
from sparsecache.longbench.compare import compare
from sparsecache.longbench.comparison import Difference
from sparsecache.longbench.gate import gate
from sparsecache.longbench.gate_checks import Limits
from sparsecache.longbench.paired import bootstrap_means, confidence_interval
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.scores import ScoringOptions, score_run
from tests.longbench.scoring import difference, lines_of

MakeRun = Callable[..., Path]
Row = Callable[..., dict[str, Any]]


def letters(rng: random.Random, rows: int) -> str:
    return "".join(rng.choice("ynh") for _ in range(rows))


def quantile(values: list[float], share: float) -> float:
    """Return a quantile, interpolated between the two nearest ranks."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def test_intervals_equal_those_of_a_plain_loop(scored: Callable[..., RunScore]) -> None:
    rng = random.Random(0)
    sizes = {"qasper": 27, "multifieldqa_en": 25, "hotpotqa": 31, "lcc": 24}
    first, second = (scored(name, **{stem: letters(rng, rows) for stem, rows in sizes.items()}) for name in "ab")
    found = compare([first, second], seed=3, resamples=300)
    differences = {
        one.task.name: [100 * (two.rows[at].score - one.rows[at].score) for at in sorted(range(len(one.rows)), key=str)]
        for one, two in zip(first.datasets, second.datasets, strict=True)
    }  # an `_id` is the number of its row
    means: dict[str, list[float]] = {}
    for stem, values in differences.items():
        generator = numpy.random.default_rng([3, crc32(stem.encode())])
        means[stem] = []
        for _ in range(300):
            drawn = generator.integers(len(values), size=len(values))
            means[stem].append(sum(values[at] for at in drawn) / len(values))
    loop = dict(means)
    loop["single_doc_qa"] = [sum(pair) / 2 for pair in zip(means["qasper"], means["multifieldqa_en"], strict=True)]
    groups = (loop["single_doc_qa"], means["hotpotqa"], means["lcc"])
    loop["avg_en"] = loop["avg_all"] = [sum(three) / 3 for three in zip(*groups, strict=True)]
    loop["flat_mean"] = [sum(four) / 4 for four in zip(*(means[stem] for stem in sizes), strict=True)]
    for name, values in loop.items():
        expected = [quantile(values, share) for share in (0.025, 0.975)]
        assert difference(found, name).interval == pytest.approx(expected, abs=1e-9), name


def test_drawing_in_batches_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = numpy.random.default_rng(0).normal(size=(37, 2))
    whole = bootstrap_means(values, "qasper", 5, 1000)
    monkeypatch.setattr("sparsecache.longbench.paired._MAX_DRAWS", 100)
    assert whole.shape == (1000, 2)
    assert (bootstrap_means(values, "qasper", 5, 1000) == whole).all()
    assert (bootstrap_means(values[:, 1:], "qasper", 5, 1000) == whole[:, 1:]).all()  # whoever else is compared
    assert (bootstrap_means(values, "qasper", 6, 1000) != whole).any()
    assert (bootstrap_means(values, "lcc", 5, 1000) != whole).any()


@pytest.mark.parametrize(("rows", "ones"), [(100, 50), (200, 20), (60, 45)])
def test_intervals_of_wins_and_losses_are_binomial(rows: int, ones: int) -> None:
    values = numpy.array([[1.0]] * ones + [[0.0]] * (rows - ones))
    low, high = confidence_interval(bootstrap_means(values, "qasper", 0)[:, 0])
    share, cumulated, bounds = ones / rows, 0.0, []
    for count in range(rows + 1):
        before = cumulated
        cumulated += math.comb(rows, count) * share**count * (1 - share) ** (rows - count)
        bounds += [count / rows for limit in (0.025, 0.975) if before < limit <= cumulated]
    assert (low, high) == pytest.approx(bounds, abs=1.01 / rows)


def test_intervals_cover_the_true_difference_in_95_percent() -> None:
    generator = numpy.random.default_rng(1)
    inside = 0
    for trial in range(400):
        # Rows of very different spread in two datasets; scores gain 3 points on average in one and lose 1 in the other.
        first = 3 + 30 * (generator.random((120, 1)) - 0.5) * generator.integers(1, 4, size=(120, 1))
        second = generator.choice([-21.0, 19.0], size=(80, 1))
        means = [bootstrap_means(values, name, trial, 1000) for values, name in ((first, "a"), (second, "b"))]
        low, high = confidence_interval((means[0][:, 0] + means[1][:, 0]) / 2)
        inside += low <= 1.0 <= high
    assert 365 <= inside <= 393  # 91 to 98 %


def test_swapping_the_runs_mirrors_the_differences(scored: Callable[..., RunScore]) -> None:
    rng = random.Random(2)
    runs = [scored(name, qasper=letters(rng, 22), hotpotqa=letters(rng, 20)) for name in "ab"]
    there, back = compare(runs), compare(runs[::-1])
    for line in there.groups:
        one, other = difference(there, line.name), difference(back, line.name)
        assert one.interval is not None and other.interval is not None
        assert one.mean == pytest.approx(-other.mean)
        assert one.interval == pytest.approx([-other.interval[1], -other.interval[0]])
        assert (one.wins, one.losses, one.ties, one.changed) == (other.losses, other.wins, other.ties, other.changed)


def test_the_order_of_files_changes_no_interval(make_run: MakeRun, row: Row) -> None:
    """Rows are written as they are finished."""
    rng = random.Random(2)
    texts = {name: [rng.choice(["yes", "no", "yes maybe"]) for _ in range(30)] for name in "ab"}

    def run(folder: str, name: str, order: list[int]) -> RunScore:
        return score_run(make_run(f"{folder}/{name}", {"qasper": [row(at, texts[name][at]) for at in order]}))

    found = [
        compare([run(folder, name, rng.sample(range(30), 30)) for name in "ab"]).groups for folder in ("one", "two")
    ]
    assert found[0] == found[1] and found[0][0].entries[1].difference.interval is not None
    baseline, *candidates = (
        make_baseline(run(f"gate{at}", "b" if at else "a", rng.sample(range(30), 30)), ScoringOptions())
        for at in range(7)
    )
    verdicts = [gate(each, baseline, Limits(non_inferior=1.0)).checks for each in candidates]
    assert all(checks == verdicts[0] for checks in verdicts)


def test_the_seed_determines_the_intervals(scored: Callable[..., RunScore]) -> None:
    rng = random.Random(2)
    runs = [scored(name, qasper=letters(rng, 30)) for name in "ab"]
    assert compare(runs, 1) == compare(runs, 1)
    assert difference(compare(runs, 1), "qasper").interval != difference(compare(runs, 3), "qasper").interval
    assert (compare(runs).seed, compare(runs).resamples) == (0, 10_000)


def test_a_run_compared_with_itself_has_no_difference(scored: Callable[..., RunScore]) -> None:
    run = scored("a", qasper="ynhhy" * 4, lcc="nh" * 10, trec="yyn" * 7)
    found = compare([run, run])
    assert [one.name for one in found.runs] == ["a (1)", "a (2)"]
    for line in found.groups:
        assert line.entries[1].difference == Difference(0.0, (0.0, 0.0), 0, 0, line.n, 0)
        assert line.entries[0].score == line.entries[1].score
        assert not line.entries[0].best and not line.entries[1].best and line.entries[0].difference is None


def test_one_row_has_no_interval(scored: Callable[..., RunScore]) -> None:
    found = compare([scored("a", qasper="y", hotpotqa="yn" * 10), scored("b", qasper="n", hotpotqa="yy" * 10)])
    intervals = {name: difference(found, name).interval is None for name in lines_of(found)}
    assert intervals == {
        "qasper": True, "hotpotqa": False, "single_doc_qa": True, "multi_doc_qa": False,
        "avg_en": True, "avg_all": True, "flat_mean": True,
    }  # fmt: skip
    assert difference(found, "qasper").mean == -100.0


def test_fewer_than_twenty_rows_have_no_interval(scored: Callable[..., RunScore]) -> None:
    sizes = {"qasper": 19, "hotpotqa": 20, "lcc": 2}
    runs = [
        scored(name, **{stem: letter * rows for stem, rows in sizes.items()})
        for name, letter in (("a", "y"), ("b", "h"))
    ]
    found = compare(runs)
    with_interval = [name for name in lines_of(found) if difference(found, name).interval is not None]
    assert with_interval == ["hotpotqa", "multi_doc_qa", "avg_en", "avg_all", "flat_mean"]
    assert any("fewer than 20 in qasper, lcc." in note for note in found.notes)
