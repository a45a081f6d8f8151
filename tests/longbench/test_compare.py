"""Comparisons: bootstrap intervals, matching of rows, official scores, notes and tables.

In one file because every test compares runs made by the same fixture.
"""

import csv
import io
import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy
import pytest

from sparsecache.errors import UsageError
from sparsecache.longbench.compare import compare
from sparsecache.longbench.compare_tables import compare_document
from sparsecache.longbench.comparison import Comparison, Difference, Group
from sparsecache.longbench.paired import bootstrap_means, confidence_interval
from sparsecache.longbench.run_record import ModelRecord
from sparsecache.longbench.runs import short_names
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.scores import score_run
from sparsecache.longbench.subjects import subject
from sparsecache.longbench.tables import render

MakeRun = Callable[..., Path]
Row = Callable[..., dict[str, Any]]
FEW = 200  # resamples, where the interval is not the question


def lines_of(comparison: Comparison) -> dict[str, Group]:
    return {line.name: line for line in comparison.groups}


def difference(comparison: Comparison, name: str, run: int = 1) -> Difference:
    found = lines_of(comparison)[name].entries[run].difference
    assert found is not None
    return found


@pytest.fixture
def scored(make_run: MakeRun, row: Row) -> Callable[..., RunScore]:
    """Return a function that scores a run from letters per dataset: 1 (y), 0 (n), 2/3 (h)."""
    texts = {"y": "yes", "n": "no", "h": "yes maybe"}
    classes = {"trec": ["yes", "no"]}

    def make(name: str, e: bool = False, options: dict[str, Any] | None = None, **datasets: str) -> RunScore:
        rows = {
            f"{stem}_e" if e else stem: [
                row(number, texts[letter], all_classes=classes.get(stem)) for number, letter in enumerate(letters)
            ]
            for stem, letters in datasets.items()
        }
        return score_run(make_run(name, rows, **(options or {})), e)

    return make


def letters(rng: random.Random, rows: int) -> str:
    return "".join(rng.choice("ynh") for _ in range(rows))


# Intervals


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
        one.task.name: [100 * (other.score - mine.score) for mine, other in zip(one.rows, two.rows, strict=True)]
        for one, two in zip(first.datasets, second.datasets, strict=True)
    }
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


def test_the_seed_determines_the_intervals(scored: Callable[..., RunScore]) -> None:
    rng = random.Random(2)
    runs = [scored(name, qasper=letters(rng, 30)) for name in "ab"]
    assert compare(runs, 1) == compare(runs, 1)
    assert difference(compare(runs, 1), "qasper").interval != difference(compare(runs, 2), "qasper").interval
    assert (compare(runs).seed, compare(runs).resamples) == (0, 10_000)


def test_a_run_compared_with_itself_has_no_difference(scored: Callable[..., RunScore]) -> None:
    run = scored("a", qasper="ynhhy" * 4, lcc="nh" * 10, trec="yyn" * 7)
    found = compare([run, run])
    assert [one.name for one in found.runs] == ["a (1)", "a (2)"]
    for line in found.groups:
        assert line.entries[1].difference == Difference(0.0, (0.0, 0.0), 0, 0, line.n, 0)
        assert line.entries[0].score == line.entries[1].score
        assert line.entries[0].best and line.entries[1].best and line.entries[0].difference is None


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
    assert found.notes[-1].startswith("Fewer than 20 rows: qasper, lcc. They have no interval of their own,")


# Rows


def test_rows_are_matched_by_id_in_any_order(make_run: MakeRun, row: Row) -> None:
    first = make_run("a", {"qasper": [row(1), row(2, "no"), row(3)], "trec": [row(1, all_classes=["yes"])]})
    second = make_run("b", {"qasper": [row(9), row(3, "no"), row(2), row(1)], "lcc": [row(1)]})
    found = compare([score_run(first), score_run(second)])
    line = lines_of(found)["qasper"]
    assert (line.n, [entry.score for entry in line.entries]) == (3, [66.67, 66.67])
    won = difference(found, "qasper")
    assert (won.wins, won.losses, won.ties, won.changed, won.mean) == (1, 1, 1, 2, 0.0)
    assert {"lcc", "trec"}.isdisjoint(lines_of(found))
    assert [(run.rows, run.left_out) for run in found.runs] == [(4, 1), (5, 2)]
    assert found.notes[0] == (
        "Compared on the 3 rows that all runs have (same dataset and _id). Left out: 1 of 4 rows of a, 2 of 5 rows "
        "of b."
    )


def test_only_rows_of_all_runs_count(make_run: MakeRun, row: Row) -> None:
    sets = {"a": [0, 1, 2, 3], "b": [1, 2, 3, 4], "c": [2, 3, 5]}
    runs = [score_run(make_run(name, {"qasper": [row(at) for at in ids]})) for name, ids in sets.items()]
    assert lines_of(compare(runs))["qasper"].n == 2
    assert [lines_of(compare(list(pair)))["qasper"].n for pair in itertools.combinations(runs, 2)] == [3, 2, 2]


def test_scores_equal_those_of_files_with_only_the_common_rows(make_run: MakeRun, row: Row) -> None:
    rng = random.Random(5)
    stems = ("qasper", "multifieldqa_en", "hotpotqa", "gov_report", "vcsum", "samsum", "lcc")
    texts = ["yes", "no", "yes no", "yes yes maybe so", "a yes", ""]
    made: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, offset in (("a", 0), ("b", 3)):
        made[name] = {
            stem: [row(at, rng.choice(texts), kept=rng.random()) for at in range(offset, offset + 10)] for stem in stems
        }
    found = compare([score_run(make_run(name, rows)) for name, rows in made.items()], resamples=FEW)
    for at, name in enumerate(made):
        alone = {stem: [each for each in rows if 3 <= int(each["_id"]) < 10] for stem, rows in made[name].items()}
        result = score_run(make_run(f"{name}-alone", alone))
        expected = {each.task.name: (each.summary.score, each.summary.stderr) for each in result.datasets}
        kept = {each.task.name: each.kept.share for each in result.datasets if each.kept}
        for means in (result.categories, result.averages):
            expected |= {key: (mean.score, mean.stderr) for key, mean in means.items() if mean.datasets}
            kept |= {key: mean.kept for key, mean in means.items() if mean.datasets}
        lines = lines_of(found)
        assert {key: (line.entries[at].score, line.entries[at].stderr) for key, line in lines.items()} == expected
        assert {key: line.entries[at].kept for key, line in lines.items()} == kept
    for line in found.groups:
        of_scores = line.entries[1].score - line.entries[0].score
        assert difference(found, line.name).mean == pytest.approx(of_scores, abs=0.0101)
    assert [line.kind for line in found.groups] == ["dataset"] * 7 + ["category"] * 5 + ["average"] * 4
    assert (lines_of(found)["avg_all"].datasets, lines_of(found)["avg_all"].of_datasets) == (7, 21)


def test_longbench_e_is_compared(scored: Callable[..., RunScore]) -> None:
    runs = [scored("a", e=True, qasper="yn", trec="yy"), scored("b", e=True, qasper="yy", trec="yn")]
    found = compare(runs)
    assert found.e and [line.name for line in found.groups][:2] == ["qasper_e", "trec_e"]
    assert difference(found, "qasper_e").mean == 50.0
    with pytest.raises(ValueError, match="all of LongBench-E"):
        compare([runs[0], scored("c", qasper="yy")])
    with pytest.raises(ValueError, match="two or more"):
        compare(runs[:1])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"qasper": [("7", {})]}, "have no rows in common"),
        ({"hotpotqa": [("1", {})]}, "have no rows in common"),
        ({"qasper": [("1", {"_id": ...})]}, "rows without an `_id` by their order, if number of rows"),
        ({"qasper": [("1", {"_id": None})]}, "have no rows in common"),
        ({"qasper": [("1", {"_id": None}), ("2", {"_id": None, "length": 9})]}, "have no rows in common"),
        ({"qasper": [("1", {"_id": None}), ("2", {"_id": None, "answers": ["no"]})]}, "have no rows in common"),
        ({"qasper": [("1", {"answers": ["no"]})]}, "Row 1 of qasper has different answers in a and b"),
    ],
)
def test_incomparable_runs_are_refused(make_run: MakeRun, row: Row, other: Any, message: str) -> None:
    rows = {stem: [row(number, **more) for number, more in rows] for stem, rows in other.items()}
    runs = [score_run(make_run("a", {"qasper": [row(1), row(2)]})), score_run(make_run("b", rows))]
    with pytest.raises(UsageError, match=message):
        compare(runs)


@pytest.mark.parametrize("with_ids", ["a", "b", ""])
def test_rows_without_ids_are_matched_by_order(make_run: MakeRun, row: Row, with_ids: str) -> None:
    texts = {"a": ["yes", "no", "yes"], "b": ["yes", "yes", "no"]}
    runs = [
        score_run(
            make_run(
                name,
                {
                    "qasper": [
                        row(at, text, **({} if name == with_ids else {"_id": ...})) for at, text in enumerate(preds)
                    ]
                },
            )
        )
        for name, preds in texts.items()
    ]
    found = compare(runs)
    won = difference(found, "qasper")
    assert (won.wins, won.losses, won.ties) == (1, 1, 1)
    assert found.notes[0] == (
        "Rows without an `_id` were matched by their order, because number of rows, answers and lengths agree: qasper."
    )


def test_repeated_ids_are_refused_even_if_the_scorer_allows_them(make_run: MakeRun, row: Row) -> None:
    from sparsecache.longbench.scores import ScoringOptions

    folder = make_run("a", {"qasper": [row(1), row(1)]})
    run = score_run(folder, options=ScoringOptions(allow_duplicates=True))
    with pytest.raises(UsageError, match="qasper of a.* repeats _ids"):
        compare([run, run])


# What else is said


def test_the_best_runs_are_marked_including_ties(scored: Callable[..., RunScore]) -> None:
    runs = [scored("a", qasper="yn", hotpotqa="yn"), scored("b", qasper="ny", hotpotqa="yy")]
    found = lines_of(compare([*runs, scored("c", qasper="nn", hotpotqa="nn")]))
    assert {name: [entry.best for entry in line.entries] for name, line in found.items() if line.kind == "dataset"} == {
        "qasper": [True, True, False],
        "hotpotqa": [False, True, False],
    }
    assert [entry.best for entry in found["flat_mean"].entries] == [False, True, False]


def test_notes_qualify_the_numbers(make_run: MakeRun, row: Row) -> None:
    failed = row(1, "", error="OutOfMemoryError")
    first = make_run("a", {"qasper": [row(0), row(1)]}, expected={"qasper": 3})
    second = make_run("b", {"qasper": [row(0, prompt_sha256="0" * 64 + "x"), failed]})
    found = compare([score_run(first), score_run(second)])
    assert found.notes == (
        "INCOMPLETE: a, b. Score each run separately to see the missing rows.",
        "1 of these rows failed in b and count 0.0. Predict again to retry them.",
        "b and a had different prompts in 1 of 2 rows.",
        "Fewer than 20 rows: every dataset. They have no interval of their own, and intervals of means over them are "
        "too narrow.",
    )
    assert [entry.errors for entry in lines_of(found)["qasper"].entries] == [0, 1]
    assert lines_of(found)["qasper"].entries[1].score == 50.0


def test_complete_runs_over_the_same_rows_need_no_note(make_run: MakeRun, row: Row) -> None:
    rows = {"qasper": [row(at) for at in range(20)]}
    assert compare([score_run(make_run(name, rows)) for name in "ab"]).notes == ()


def test_speed_comes_from_run_json_and_the_rows(make_run: MakeRun, row: Row) -> None:
    timed = [row(0, new_tokens=11, decode_s=2.0, kept=0.5), row(1, new_tokens=21, decode_s=1.0, kept=None)]
    odd = [row(2, new_tokens=1, decode_s=0.0), row(3, new_tokens="x", decode_s=1.0)]
    clock = {"prefill_s": 1.0, "prefill_tokens": 10, "decode_s": 4.0, "decode_tokens": 10, "peak_gpu_bytes": None}
    session = {"gpu": None, "device": "cpu", "id": "17-my-host", "clock": clock}
    identity = {"method": "infinigen", "options": {"budget": 0.2, "alpha": 4}}
    first, second = make_run("a", {"qasper": timed + odd}), make_run("b", {"qasper": timed}, identity, session)
    found = compare([score_run(first), score_run(second)])
    assert [run.decode and run.decode["tokens_per_s"] for run in found.runs] == [50.0, 2.5]
    assert [run.devices for run in found.runs] == [["H200"], ["cpu of my-host"]]
    assert [(run.method, run.options) for run in found.runs] == [("vanilla", ""), ("infinigen", "budget=0.2, alpha=4")]
    assert "budget=0.2, alpha=4" in render(compare_document(found).with_details(), "terminal")
    assert [run.kept for run in found.runs] == [0.5, 0.5]
    assert [entry.tokens_per_s for entry in lines_of(found)["flat_mean"].entries] == [10.0, 10.0]


def test_folders_without_run_json_are_compared_if_rows_have_ids(make_run: MakeRun, row: Row) -> None:
    bare = [{"pred": "yes", "answers": ["yes"], "all_classes": None, "_id": str(at)} for at in range(2)]
    runs = [score_run(make_run(name, {"qasper": bare}, record=False)) for name in "ab"]
    found = compare(runs)
    assert lines_of(found)["qasper"].entries[1].tokens_per_s is None
    assert [(run.method, run.decode, run.devices) for run in found.runs] == [(None, None, [])] * 2
    assert "INCOMPLETE: a, b" in found.notes[0]
    assert render(compare_document(found), "terminal")


def test_run_names_are_the_shortest_distinct_ones() -> None:
    def names(*folders: str) -> list[str]:
        return short_names([Path(folder) for folder in folders])

    assert names("pred/m/a", "pred/m/b") == ["a", "b"]
    assert names("pred/m/a", "pred/n/a", "pred/n/b") == ["m/a", "n/a", "n/b"]
    assert names("pred/m/a", "pred/m/a", "other/m/a") == ["pred/m/a (1)", "pred/m/a (2)", "other/m/a"]


# Tables


CACHE = {"layers": 10, "full_token_nbytes": 4096, "token_nbytes": 1024.0, "host_token_nbytes": 512.0}


def test_the_first_table_has_one_line_per_run(make_run: MakeRun, row: Row) -> None:
    full = make_run("a", {"qasper": [row(at) for at in range(40)]}, session={"cache": {**CACHE, "token_nbytes": 4096}})
    rows = [row(at, "yes" if at % 4 else "no", kept=0.1, dense_layers=2) for at in range(40)]
    sparse = make_run("b", {"qasper": rows}, {"method": "h2o"}, {"cache": CACHE})
    document = compare_document(compare([score_run(full), score_run(sparse), score_run(full)]))
    assert document.title == "m on LongBench: b, a (3) against a (1)"
    (table,) = document.tables
    assert table.header == [
        "run", "score", "difference", "95% interval", "kept", "whole model", "cache KiB/token", "on host", "tokens/s"
    ]  # fmt: skip
    found = [[cell.text for cell in line] for line in table.rows]
    assert found[0] == ["a (1)", "100.00", "-", "-", "-", "100.0%", "4.5", "0.5", "50.0"]
    assert found[1][:3] + found[1][4:] == [
        "b",
        "75.00",
        "-25.0",
        "10.0%",
        "28.0%",
        "1.5",
        "0.5",
        "50.0",
    ]  # (2 + 8 x 0.1) / 10
    assert found[2][2:4] == ["0.00", "0.00 to 0.00"]
    text = render(document, "terminal")
    assert (
        text.count("\nb ") == 1
        and "qasper" not in text
        and "score: mean of 1 dataset, 40 rows; the highest is marked." in text
    )
    facts = json.loads(render(document, "json"))["rows"][1]
    assert (facts["cache_bytes_per_token"], facts["full_cache_bytes_per_token"]) == (1536.0, 4096)
    assert facts["model_share"] == pytest.approx(0.28)


def test_the_first_table_names_the_dtypes_if_they_differ(make_run: MakeRun, row: Row) -> None:
    runs = [
        score_run(make_run(name, {"qasper": [row(0), row(1)]}, {"dtype": dtype}))
        for name, dtype in (("a", "fp8"), ("b", "bfloat16"), ("c", "fp8"))
    ]
    (table,) = compare_document(compare(runs)).tables
    assert [line[table.header.index("dtype")].text for line in table.rows] == ["fp8", "bfloat16", "fp8"]
    (table,) = compare_document(compare(runs[::2])).tables
    assert "dtype" not in table.header


def test_each_benchmark_has_a_table_of_its_own(make_run: MakeRun, row: Row) -> None:
    v2 = [row(at, "The correct answer is (A)", answers=["A"], length="short", difficulty="easy") for at in range(2)]
    runs = [score_run(make_run(name, {"qasper": [row(0)], "longbench_v2": v2})) for name in "ab"]
    document = compare_document(compare(runs))
    assert [table.title for table in document.tables] == [
        "LongBench: mean of 1 dataset, 1 row", "LongBench v2: mean of 1 dataset, 2 rows"]  # fmt: skip
    assert document.title == "m on LongBench and LongBench v2: b against a"


def test_titles_name_the_data(make_run: MakeRun, row: Row) -> None:
    def title(name: str, data: dict[str, Any] | None) -> str:
        return subject([score_run(make_run(name, {"qasper": [row(0)]}, session={"data": data}))])

    assert title("a", {"source": "sample", "rows": 2}) == "m on synthetic rows"
    assert title("b", {"source": "folder", "path": "/home/me/my rows"}) == "m on LongBench rows of my rows"
    assert title("c", {"source": "hub", "path": "/cache/data.zip"}) == title("d", None) == "m on LongBench"


def test_in_detail_two_runs_give_one_table_and_more_give_one_each(scored: Callable[..., RunScore]) -> None:
    runs = [scored(name, qasper=text * 10) for name, text in (("a", "yynn"), ("b", "yyny"), ("c", "ynnn"))]
    two, three = (compare_document(compare(runs[:count])).with_details() for count in (2, 3))
    assert two.tables[1].header == [
        "dataset", "n", "a", "b", "difference", "95% interval", "wins", "losses", "changed", "kept"]  # fmt: skip
    assert [table.title for table in two.tables[1:]] == ["", "speed and memory of each run, over all of its rows"]
    assert [table.title for table in three.tables][2:4] == ["b against a", "c against a"]
    line = next(line for line in render(two, "terminal").split("\n") if line.startswith("qasper"))
    assert line.split()[:5] == ["qasper", "40", "50.00", "75.00*", "+25.0"]
    assert line.split()[8:] == ["10", "0", "10", "-"]
    text = render(three, "terminal")
    assert "peak GPU GiB" in text and "H200" in text and "10,000 resamples, seed 0" in text
    assert text.count("\nqasper") == 3


def test_decimals_of_differences_depend_on_the_interval(make_run: MakeRun, row: Row) -> None:
    rows = [row(at) for at in range(200)]
    worse = [row(0, "no"), *rows[1:]]
    close = compare_document(
        compare([score_run(make_run("a", {"qasper": rows})), score_run(make_run("b", {"qasper": worse}))])
    )
    assert [cell.text for cell in close.details[0].rows[0]][4:6] == ["-0.5", "-1.5 to 0.0"]
    calm = [row(at, "yes " * 9 + "no" * (at == 0)) for at in range(200)]
    still = [row(at, "yes " * 9) for at in range(200)]
    narrow = compare_document(
        compare([score_run(make_run("c", {"qasper": still})), score_run(make_run("d", {"qasper": calm}))])
    )
    text = [cell.text for cell in narrow.details[0].rows[0]]
    assert text[4:6] == ["-0.01", "-0.03 to 0.00"]


def test_the_flat_table_holds_unrounded_numbers(scored: Callable[..., RunScore]) -> None:
    found = compare([scored("a", qasper="yyn" * 7, trec="yn"), scored("b", qasper="yhn" * 7, trec="yy")])
    document = compare_document(found)
    rows = json.loads(render(document, "json"))["rows"]
    assert len(rows) == 2 * len(found.groups)
    for at, (line, run) in enumerate((line, run) for line in found.groups for run in range(2)):
        entry, said = line.entries[run], rows[at]
        assert (said["run"], said["kind"], said["name"], said["n"]) == ("ab"[run], line.kind, line.name, line.n)
        assert (said["score"], said["stderr"], said["best"]) == (entry.score, entry.stderr, entry.best)
        if entry.difference is None:
            assert {said[key] for key in ("difference", "low", "high", "wins", "changed")} == {None}
        else:
            assert (said["difference"], [said["low"], said["high"]]) == (
                entry.difference.mean, list(entry.difference.interval or (None, None)))  # fmt: skip
            assert said["wins"] + said["losses"] + said["ties"] == line.n
    read = list(csv.DictReader(io.StringIO(render(document, "csv"))))
    assert [float(line["score"]) for line in read] == [line["score"] for line in rows]
    assert [line["low"] for line in read if line["run"] == "a"] == [""] * len(found.groups)


def test_the_note_of_a_checkpoint_is_above_the_tables(scored: Callable[..., RunScore]) -> None:
    run = scored("a", qasper="yn")
    run = replace(run, run=replace(run.run, model=ModelRecord("Random weights.")))
    assert compare_document(compare([run, scored("b", qasper="yn")])).preamble == ["Note on a: Random weights."]
