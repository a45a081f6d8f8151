"""The gate refuses runs that are not comparable."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsecache.errors import UsageError
from sparsecache.longbench.baseline import Baseline
from sparsecache.longbench.gate import check_complete, gate
from sparsecache.longbench.gate_checks import Limits
from sparsecache.longbench.scores import ScoringOptions

MakeRun = Callable[..., Path]
Row = Callable[..., dict[str, Any]]
Make = ScoreToBaseline = Callable[..., Baseline]


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({"checkpoint": "d" * 64}, "the checkpoint's files"),
        ({"window": 2048}, r"the window \(2048, baseline 4096\)"),
        ({"max_length": 3500}, r"the max_length \(3500, baseline unknown\)"),
        ({"stop_ids": [1, 2]}, r"the stop_ids \(\[1, 2\], baseline \[1\]\)"),
        ({"chat": "template"}, r"the chat \(template, baseline unknown\)"),
        ({"something_new": 1}, r"the something_new"),
        ({"data": {"qasper": "other"}}, "the data of qasper"),
        ({"templates": {"qasper": "other"}}, "the prompt template of qasper"),
        ({"protocol": {}}, r"the protocol of qasper \(unknown, baseline protocol\)"),
    ],
)
def test_runs_with_different_identities_are_refused(
    make_baseline_run: Make, identity: dict[str, Any], message: str
) -> None:
    before, after = make_baseline_run("a", {"qasper": "y"}), make_baseline_run("b", {"qasper": "y"}, identity=identity)
    with pytest.raises(UsageError, match=f"differ in more than the method: {message}.*--allow_unlike"):
        gate(after, before, Limits())
    with pytest.raises(UsageError, match=r"differ in more than the method"):
        gate(before, after, Limits())
    verdict = gate(after, before, Limits(), allow_unlike=True)
    assert verdict.passed and len(verdict.warnings) == 1


def test_unknown_values_do_not_count_as_equal(make_baseline_run: Make) -> None:
    run = make_baseline_run("a", {"qasper": "y"}, identity={"data": {}})
    with pytest.raises(UsageError, match=r"the data of qasper \(unknown, baseline unknown\)"):
        gate(run, run, Limits())


def test_different_prompts_are_refused(make_baseline_run: Make) -> None:
    before, after = (
        make_baseline_run("a", {"qasper": "yy"}),
        make_baseline_run("b", {"qasper": "yy"}, {"prompt_sha256": "0" * 64 + "x"}),
    )
    with pytest.raises(UsageError, match="the prompts of 1 rows of qasper"):
        gate(after, before, Limits())


def test_different_scoring_options_are_refused(make_run: MakeRun, row: Row, score_to_baseline: ScoreToBaseline) -> None:
    folder = make_run("a", {"lcc": [row(0)]})
    mine = score_to_baseline(folder, options=ScoringOptions(edit_backend="fuzzywuzzy"))
    with pytest.raises(UsageError, match=r"the scorer's choice of edit_backend \(fuzzywuzzy, baseline difflib\)"):
        gate(mine, score_to_baseline(folder), Limits())


@pytest.mark.parametrize(
    ("identity", "warnings"),
    [
        ({"method": "infinigen", "options": {"budget": 0.2}, "calibration_sha256": "1"}, []),
        ({"engine": "transformers", "dtype": "float32"}, ["the engine (", "the dtype ("]),
        ({"data": {"qasper": "data", "lcc": "more"}}, []),
    ],
)
def test_the_method_and_engine_may_differ(
    make_baseline_run: Make, identity: dict[str, Any], warnings: list[str]
) -> None:
    before, after = make_baseline_run("a", {"qasper": "y"}), make_baseline_run("b", {"qasper": "y"}, identity=identity)
    verdict = gate(after, before, Limits())
    assert verdict.passed
    assert [warning.startswith(start) for warning, start in zip(verdict.warnings, warnings, strict=True)] == [
        True for _ in warnings
    ]


def test_long_lists_of_differences_are_shortened(make_baseline_run: Make) -> None:
    stems = ["qasper", "hotpotqa", "lcc", "samsum", "triviaqa", "musique", "vcsum"]
    before = make_baseline_run("a", dict.fromkeys(stems, "y"))
    after = make_baseline_run("b", dict.fromkeys(stems, "y"), identity={"data": dict.fromkeys(stems, "other")})
    with pytest.raises(UsageError, match=r"(the data of \w+; ){5}and 2 more\. Predict"):
        gate(after, before, Limits())


def test_a_folder_without_run_json_needs_allow_unlike(make_baseline_run: Make) -> None:
    before = make_baseline_run("a", {"qasper": "y" * 200}, record=False)
    after = make_baseline_run("b", {"qasper": "y" * 200})
    for mine, theirs in ((after, before), (before, after), (before, before)):
        with pytest.raises(UsageError, match=f"no run.json says how {before.name} was made"):
            gate(mine, theirs, Limits())
        assert gate(mine, theirs, Limits(), allow_unlike=True).passed
    with pytest.raises(UsageError, match="has no run.json"):
        check_complete(before)
    check_complete(before, allow_unlike=True)


@pytest.mark.parametrize(
    ("datasets", "expected", "message"),
    [
        ({"qasper": "yyx"}, None, r"b is incomplete \(qasper 2 of 3 rows, 1 failed\)"),
        ({"qasper": "yyy"}, {"qasper": 4}, r"b is incomplete \(qasper 3 of 4 rows\)"),
        ({"qasper": "yyy"}, {"qasper": 3, "lcc": 2}, r"b is incomplete \(lcc 0 of 2 rows\)"),
        ({"qasper": "yy"}, None, r"b lacks rows of the baseline \(qasper 1 of 3 rows\)"),
        ({"qasper": "yyy"}, None, r"b lacks rows of the baseline \(hotpotqa 1 of 1 rows\)"),
    ],
)
def test_partial_runs_are_refused(
    make_baseline_run: Make, datasets: dict[str, str], expected: dict[str, int] | None, message: str
) -> None:
    whole = {"qasper": "yyy", "hotpotqa": "y"} if "hotpotqa" in message else {"qasper": "yyy"}
    before, after = make_baseline_run("a", whole), make_baseline_run("b", datasets, expected=expected)
    with pytest.raises(UsageError, match=f"{message}.*--allow_partial"):
        gate(after, before, Limits())
    verdict = gate(after, before, Limits(100), allow_partial=True)
    assert verdict.passed and "only common rows are compared, and failed rows count 0.0" in verdict.warnings[0]


def test_partial_baselines_are_refused_and_not_saved(make_baseline_run: Make) -> None:
    before, after = make_baseline_run("a", {"qasper": "yx"}), make_baseline_run("b", {"qasper": "yy"})
    with pytest.raises(UsageError, match=r"a is incomplete \(qasper 1 of 2 rows, 1 failed\)"):
        gate(after, before, Limits())
    assert gate(after, before, Limits(), allow_partial=True).passed
    with pytest.raises(UsageError, match="cannot be a baseline"):
        check_complete(before)
    check_complete(before, allow_partial=True)
    check_complete(after)


def test_runs_without_common_rows_are_always_refused(make_baseline_run: Make) -> None:
    before, after = make_baseline_run("a", {"qasper": "y"}), make_baseline_run("b", {"lcc": "y"})
    with pytest.raises(UsageError, match="have no row in common"):
        gate(after, before, Limits(), allow_partial=True, allow_unlike=True)


@pytest.mark.parametrize("run", ["nn", "yn"])
def test_a_baseline_that_scores_0_gives_no_verdict(make_baseline_run: Make, run: str) -> None:
    before, after = (
        make_baseline_run("a", {"qasper": "nn", "lcc": "n"}),
        make_baseline_run("b", {"qasper": run, "lcc": "n"}),
    )
    with pytest.raises(
        UsageError, match=r"No verdict: .*a scores 0 in all compared rows of .*, so no drop .* Choose datasets that"
    ):
        gate(after, before, Limits())
    with pytest.raises(UsageError, match="No verdict"):
        gate(after, make_baseline_run("c", {"qasper": "nn", "lcc": "x"}), Limits(), allow_partial=True)


def test_a_benchmark_that_scores_0_gives_no_verdict_beside_another(make_baseline_run: Make) -> None:
    before, after = (make_baseline_run(name, {"qasper": "yy", "longbench_v2": "nn"}) for name in "ab")
    with pytest.raises(UsageError, match="No verdict: .* all compared rows of longbench_v2, so"):
        gate(after, before, Limits())


def test_longbench_and_longbench_e_are_not_comparable(
    make_run: MakeRun, row: Row, score_to_baseline: ScoreToBaseline
) -> None:
    plain = score_to_baseline(make_run("a", {"qasper": [row(0)]}))
    e = score_to_baseline(make_run("b", {"qasper_e": [row(0)]}), e=True)
    with pytest.raises(UsageError, match=r"of LongBench-E, .* is not\. Compare two LongBench-E runs with --e"):
        gate(plain, e, Limits(), allow_unlike=True)
    assert list(e.datasets) == ["qasper_e"] and gate(e, e, Limits()).passed


@pytest.mark.parametrize("more", [{"_id": ...}, {"_id": None}])
def test_rows_that_cannot_be_matched_are_refused(
    make_run: MakeRun, row: Row, more: dict[str, Any], score_to_baseline: ScoreToBaseline
) -> None:
    with pytest.raises(UsageError, match="rows with a repeated `_id`, or some without one"):
        score_to_baseline(make_run("a", {"qasper": [row(0, **more), row(1)]}))
