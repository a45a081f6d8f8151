"""Comparisons: matching of rows, official scores, notes and speed."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsecache.errors import UsageError
from sparsecache.longbench.compare import compare
from sparsecache.longbench.compare_tables import compare_document
from sparsecache.longbench.runs import short_names
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.scores import score_run
from sparsecache.longbench.tables import render
from tests.longbench.scoring import difference, lines_of

MakeRun = Callable[..., Path]
Row = Callable[..., dict[str, Any]]
FEW = 200  # resamples, where the interval is not the question


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


def test_runs_without_common_rows_are_described(make_run: MakeRun, row: Row) -> None:
    def sample(tokens: int) -> dict[str, Any]:
        return {"data": {"source": "sample", "rows": 2, "tokens": tokens, "seed": 0}}

    first = score_run(make_run("a", {"qasper": [row(1)], "lcc": [row(1)]}, session=sample(512)))
    longer = score_run(make_run("b", {"qasper": [row(2)]}, session=sample(1024)))
    many = {stem: [row(3)] for stem in ("qasper", "lcc", "hotpotqa", "samsum")}
    own = score_run(make_run("c", many, session={"data": {"source": "folder", "path": "my/rows"}}))
    bare = score_run(make_run("d", {"qasper": [row(4)]}, record=False))
    for other, said in (
        (longer, ["a (2 datasets: qasper, lcc; --sample_tokens 512)", "b (1 dataset: qasper; --sample_tokens 1024)"]),
        (own, ["a (2 datasets: qasper, lcc; --data sample;", "c (4 datasets; --data my/rows)"]),
        (bare, ["d (1 dataset: qasper)"]),
    ):
        with pytest.raises(UsageError) as error:
            compare([first, other])
        assert all(each in str(error.value) for each in said), error.value


def test_of_many_runs_those_without_common_rows_are_named(make_run: MakeRun, row: Row) -> None:
    same = [score_run(make_run(name, {"qasper": [row(1)]})) for name in "abcdefgh"]
    with pytest.raises(UsageError, match=r"a \(1 dataset: qasper\), [^,]*z \(1 dataset: lcc\) have no rows in common"):
        compare([*same, score_run(make_run("z", {"lcc": [row(1)]}))])
    other = [score_run(make_run(name, {"lcc": [row(1)]})) for name in "uvwxy"]
    with pytest.raises(UsageError) as error:
        compare([*same, *other])
    assert "w (1 dataset: lcc) and 2 more have no rows in common" in str(error.value)
    assert "b (" not in str(error.value) and "x (" not in str(error.value)
    empty = score_run(make_run("empty", {"qasper": []}))
    with pytest.raises(UsageError, match=r"empty \(0 datasets\), [^,]*a \(1 dataset: qasper\) have no rows") as error:
        compare([empty, same[0]])
    assert str(error.value).count("empty (") == 1


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
    runs = [scored("a", qasper="yn", hotpotqa="yn", lcc="y"), scored("b", qasper="ny", hotpotqa="yy", lcc="y")]
    found = lines_of(compare([*runs, scored("c", qasper="nn", hotpotqa="nn", lcc="y")]))
    assert {name: [entry.best for entry in line.entries] for name, line in found.items() if line.kind == "dataset"} == {
        "qasper": [True, True, False],
        "hotpotqa": [False, True, False],
        "lcc": [False] * 3,  # all are equal
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
        "Too few rows for reliable intervals: fewer than 20 in all datasets. Intervals of means over them, if any, "
        "are too narrow.",
    )
    assert [entry.errors for entry in lines_of(found)["qasper"].entries] == [0, 1]
    assert lines_of(found)["qasper"].entries[1].score == 50.0


@pytest.mark.parametrize(
    ("first", "warned"),
    [(("no", "no"), True), (("no", "yes"), False), (("failed", "no"), True), (("failed", "failed"), False)],
)
def test_a_reference_that_scores_0_is_warned_of(make_run: MakeRun, row: Row, first: Any, warned: bool) -> None:
    rows = {"qasper": [row(at, text, **({"error": "x"} if text == "failed" else {})) for at, text in enumerate(first)]}
    runs = [make_run("a", rows), make_run("b", {"qasper": [row(0, "no"), row(1, "yes")]})]
    found = [note for note in compare([score_run(run) for run in runs], resamples=FEW).notes if "Warning" in note]
    warning = (
        "Warning: a scores 0 in all rows, so this comparison cannot show a loss. Choose datasets that the model can "
        "answer, or a larger model."
    )
    assert found == [warning] * warned


def test_datasets_with_few_rows_are_named(make_run: MakeRun, row: Row) -> None:
    rows = {"qasper": [row(at) for at in range(20)], "lcc": [row(at) for at in range(19)]}
    (note,) = compare([score_run(make_run(name, rows)) for name in "ab"]).notes
    assert note.startswith("Too few rows for reliable intervals: fewer than 20 in lcc. ")


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
