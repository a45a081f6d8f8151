"""The gate fails regressions and passes improvements; its limits and reports."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sparsecache.errors import UsageError
from sparsecache.longbench.baseline import Baseline
from sparsecache.longbench.gate import Verdict, format_verdict, gate
from sparsecache.longbench.gate_checks import Limits
from sparsecache.longbench.gate_report import gate_title, to_junit, to_markdown
from sparsecache.longbench.html import gate_page

MakeRun = Callable[..., Path]
Row = Callable[..., dict[str, Any]]
Make = ScoreToBaseline = Callable[..., Baseline]


def texts(verdict: Verdict) -> list[str]:
    return [("" if check.passed else "FAILED ") + check.text for check in verdict.checks]


def test_a_regression_fails_with_its_size(make_baseline_run: Make) -> None:
    before = make_baseline_run("a", {"qasper": "y" * 10, "hotpotqa": "yn" * 5, "lcc": "n"})
    after = make_baseline_run("b", {"qasper": "y" * 9 + "n", "hotpotqa": "yn" * 5, "lcc": "n"})
    verdict = gate(after, before, Limits(max_drop=2.0))
    assert not verdict.passed and verdict.warnings == []
    assert texts(verdict) == [
        "FAILED mean of 3 datasets: 46.67, baseline 50.00, down 3.33, allowed drop 2: 1.33 over the limit; "
        "largest drops: qasper 10.00"
    ]
    assert list(format_verdict(verdict)) == [
        f"{after.name} (vanilla) against {before.name} (vanilla)",
        *texts(verdict)[0].replace("FAILED ", "FAILED  ", 1).split("\n"),
        "FAILED: 1 of 1 checks.",
    ]


def test_hashes_of_methods_are_shown_only_where_names_are_equal(make_baseline_run: Make) -> None:
    methods = {"a": "vanilla", "b": "mine@0123456789abcdef", "c": "mine@fedcba9876543210"}
    vanilla, mine, changed = (
        make_baseline_run(name, {"qasper": "y"}, identity={"method": method}) for name, method in methods.items()
    )
    first = gate(mine, vanilla, Limits())
    assert first.title == f"{mine.name} (mine) against {vanilla.name} (vanilla)"
    assert "@" not in gate(mine, mine, Limits()).title
    assert gate(changed, mine, Limits()).title == (
        f"{changed.name} ({methods['c']}) against {mine.name} ({methods['b']})"
    )
    page = gate_page([first, gate(changed, vanilla, Limits())])
    assert all(f"({method})" in page for method in methods.values())


def test_an_improvement_passes(make_baseline_run: Make) -> None:
    before, after = make_baseline_run("a", {"qasper": "yynn" * 5}), make_baseline_run("b", {"qasper": "yyyn" * 5})
    verdict = gate(after, before, Limits(max_drop=0, max_drop_dataset=0))
    assert verdict.passed
    assert texts(verdict) == [
        "mean of 1 datasets: 75.00, baseline 50.00, up 25.00, allowed drop 0 "
        "(95% interval of the change: +10.00 to +45.00)",
        "1 of 1 datasets: no drop, allowed 0",
    ]
    assert list(format_verdict(verdict))[-1] == "Passed."


def test_a_run_passes_against_itself_with_limits_of_zero(make_baseline_run: Make) -> None:
    run = make_baseline_run("a", {"qasper": "ynh", "trec": "y"}, {"kept": 0.1, "all_classes": ["yes"]})
    assert gate(run, run, Limits(0, 0, 1, 1)).passed


@pytest.mark.parametrize(("allowed", "passed"), [(0.99, False), (1.0, True), (1.01, True)])
def test_a_drop_equal_to_the_limit_is_allowed(make_baseline_run: Make, allowed: float, passed: bool) -> None:
    before, after = make_baseline_run("a", {"qasper": "y" * 100}), make_baseline_run("b", {"qasper": "y" * 99 + "n"})
    assert gate(after, before, Limits(allowed)).passed is passed
    assert gate(after, before, Limits(100, allowed)).passed is passed


def test_a_dataset_may_fail_while_the_mean_passes(make_baseline_run: Make) -> None:
    before = make_baseline_run("a", {"qasper": "yyyy", "hotpotqa": "nnnn", "musique": "yyyy"})
    after = make_baseline_run("b", {"qasper": "yynn", "hotpotqa": "yynn", "musique": "yyyh"})
    assert gate(after, before, Limits(3)).passed
    verdict = gate(after, before, Limits(3, 10))
    assert [check.passed for check in verdict.checks] == [True, False, True]
    assert texts(verdict)[1:] == [
        "FAILED qasper: 50.00, baseline 100.00, down 50.00, allowed drop 10: 40 over the limit",
        "2 of 3 datasets: largest drop 8.33 (musique), allowed 10",
    ]
    assert [line.split("  ")[0] for line in format_verdict(verdict)][1:4] == [
        "FAILED",
        "passed",
        "passed",
    ]


def test_scores_are_the_official_ones_of_the_common_rows(make_baseline_run: Make) -> None:
    before, after = (
        make_baseline_run("a", {"qasper": "yyn"}),
        make_baseline_run("b", {"qasper": "yyhnnnn", "hotpotqa": "y"}),
    )
    assert "mean of 1 datasets: 88.89, baseline 66.67, up 22.22, " in texts(gate(after, before, Limits()))[0]


def test_the_kept_share_is_limited(make_baseline_run: Make) -> None:
    before = make_baseline_run("a", {"qasper": "y", "lcc": "y"})
    sparse = make_baseline_run("b", {"qasper": "y", "lcc": "y"}, {"kept": 0.2004})
    assert (
        texts(gate(sparse, before, Limits(max_kept=0.2)))[1]
        == "FAILED kept 20.04%, allowed 20%: 0.04 points over the limit"
    )
    assert texts(gate(sparse, before, Limits(max_kept=0.2004)))[1] == "kept 20.04%, allowed 20.04%"
    with pytest.raises(UsageError, match=r"--max_kept 0\.2 cannot be checked: no row of .*full cache"):
        gate(before, sparse, Limits(max_kept=0.2))


def test_kept_is_the_mean_over_the_datasets_that_report_it(
    make_run: MakeRun, row: Row, score_to_baseline: ScoreToBaseline
) -> None:
    rows = {
        "qasper": [row(0, kept=0.1), row(1, kept=0.3), row(2, kept=None)],
        "hotpotqa": [row(0, kept=0.6)],
        "lcc": [row(0)],
    }
    assert score_to_baseline(make_run("a", rows)).kept == pytest.approx(0.4)


def clock(tokens: int, seconds: float) -> dict[str, Any]:
    return {"clock": {"prefill_s": 1.0, "prefill_tokens": 9, "decode_s": seconds, "decode_tokens": tokens,
                      "peak_gpu_bytes": None}}  # fmt: skip


def test_speed_is_limited(make_baseline_run: Make) -> None:
    slow, fast = (
        make_baseline_run("a", {"qasper": "y"}, session=clock(100, 4)),
        make_baseline_run("b", {"qasper": "y"}, session=clock(100, 2.5)),
    )
    assert texts(gate(fast, slow, Limits(min_speedup=1.5)))[1] == (
        "decode 40.0 tokens/s, baseline 25.0: speedup 1.60, required 1.5"
    )
    assert texts(gate(slow, fast, Limits(min_speedup=1)))[1] == (
        "FAILED decode 25.0 tokens/s, baseline 40.0: speedup 0.62, required 1: 0.38 below the limit"
    )
    assert gate(fast, slow, Limits(min_speedup=1.6)).passed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"session": {"gpu": "A100"}}, r"the device \(A100, baseline H200\)"),
        ({"session": {"gpu": None, "device": "cpu"}}, r"the device \(cpu of host, baseline H200\)"),
        ({"session": {"batch_size": 8}}, r"the batch size \(8, baseline 1\)"),
        ({"identity": {"dtype": "float32"}}, r"the dtype \(float32, baseline bfloat16\)"),
    ],
)
def test_speeds_of_different_machines_are_refused(make_baseline_run: Make, more: dict[str, Any], message: str) -> None:
    before, after = make_baseline_run("a", {"qasper": "y"}), make_baseline_run("b", {"qasper": "y"}, **more)
    assert gate(after, before, Limits()).passed
    with pytest.raises(UsageError, match=f"differ in more than the method: {message}, for the speed"):
        gate(after, before, Limits(min_speedup=1))
    verdict = gate(after, before, Limits(min_speedup=1), allow_unlike=True)
    assert verdict.passed and verdict.warnings[0].endswith(", for the speed; allowed by --allow_unlike.")


def test_speeds_over_other_rows_are_refused(make_baseline_run: Make) -> None:
    before, after = make_baseline_run("a", {"qasper": "y"}), make_baseline_run("b", {"qasper": "yy"})
    with pytest.raises(UsageError, match="the rows that the speed was measured on"):
        gate(after, before, Limits(min_speedup=1))


def test_cpus_of_two_hosts_are_two_devices(make_baseline_run: Make) -> None:
    cpu = {"gpu": None, "device": "cpu"}
    before = make_baseline_run("a", {"qasper": "y"}, session={**cpu, "id": "1-here"})
    after = make_baseline_run("b", {"qasper": "y"}, session={**cpu, "id": "2-there"})
    with pytest.raises(UsageError, match=r"the device \(cpu of there, baseline cpu of here\)"):
        gate(after, before, Limits(min_speedup=1))
    again = make_baseline_run("c", {"qasper": "y"}, session={**cpu, "id": "3-here"})
    assert gate(again, before, Limits(min_speedup=1)).passed


def test_speeds_measured_on_several_devices_are_refused(make_baseline_run: Make) -> None:
    run = make_baseline_run("a", {"qasper": "y"})
    mixed = Baseline(**{**vars(run), "devices": ["A100", "H200"]})
    with pytest.raises(UsageError, match=r"the device \(A100 and H200, baseline A100 and H200\)"):
        gate(mixed, mixed, Limits(min_speedup=1))


def test_a_session_without_decoding_adds_no_device(make_baseline_run: Make) -> None:
    assert make_baseline_run("a", {"qasper": "y"}, session={"clock": None}).devices == []
    assert make_baseline_run("b", {"qasper": "y"}, session=clock(0, 0.0)).batch_sizes == []


def test_a_run_without_a_speed_is_refused(make_baseline_run: Make) -> None:
    before, after = (
        make_baseline_run("a", {"qasper": "y"}),
        make_baseline_run("b", {"qasper": "y"}, session={"clock": None}),
    )
    for mine, theirs in ((before, after), (after, before)):
        with pytest.raises(UsageError, match=f"{after.name} has no decode speed"):
            gate(mine, theirs, Limits(min_speedup=1), allow_unlike=True)


def test_rows_without_ids_are_matched_by_order(make_run: MakeRun, row: Row, score_to_baseline: ScoreToBaseline) -> None:
    def baseline(name: str, preds: str, **more: Any) -> Baseline:
        texts = {"y": "yes", "n": "no"}
        rows = [row(at, texts[letter], _id=..., **more) for at, letter in enumerate(preds)]
        return score_to_baseline(make_run(name, {"qasper": rows}))

    before, after = baseline("a", "yyy"), baseline("b", "yny")
    assert "mean of 1 datasets: 66.67, baseline 100.00, down 33.33" in texts(gate(after, before, Limits()))[0]
    for other in (baseline("c", "yyy", length=9), baseline("d", "yyy", answers=["no"])):
        with pytest.raises(UsageError, match=r"lacks rows of the baseline \(qasper 3 of 3 rows\)"):
            gate(other, before, Limits())


def test_non_inferiority_is_judged_by_the_lower_end_of_the_interval(make_baseline_run: Make) -> None:
    before, after = make_baseline_run("a", {"qasper": "y" * 40}), make_baseline_run("b", {"qasper": "y" * 39 + "n"})
    low = -7.5  # a bootstrap sample of 40 rows holds the one lost row three times or less in 97.5 %
    assert gate(after, before, Limits(None, non_inferior=-low)).passed
    verdict = gate(after, before, Limits(None, non_inferior=7.49))
    assert texts(verdict) == [
        "FAILED non-inferiority of the mean of 1 datasets: 97.50, baseline 100.00, 95% interval of the change -7.50 to "
        "0.00, allowed from -7.49: the interval reaches 0.01 below it"
    ]
    assert [check.passed for check in gate(after, before, Limits(3, non_inferior=1)).checks] == [True, False]
    small = make_baseline_run("c", {"qasper": "y" * 19})
    with pytest.raises(UsageError, match="--non_inferior 1 cannot be checked: an interval needs 20 rows or more"):
        gate(small, small, Limits(None, non_inferior=1))


def test_reports_for_ci_hold_every_check_and_escape_names(make_baseline_run: Make) -> None:
    before = make_baseline_run("a", {"qasper": "y" * 4})
    runs = [make_baseline_run(name, {"qasper": text}) for name, text in (("<b>|x\x1b", "yyyy"), ("c", "yyyn"))]
    verdicts = [gate(run, before, Limits(1, 10)) for run in runs]
    root = ElementTree.fromstring(to_junit(verdicts))
    assert root.attrib == {"name": "gate", "tests": "4", "failures": "2"}
    suites = list(root)
    assert [(suite.attrib["tests"], suite.attrib["failures"]) for suite in suites] == [("2", "0"), ("2", "2")]
    cases = [(case.attrib["name"], [part.attrib["message"] for part in case]) for case in suites[1]]
    assert cases == [(check.name, [check.text]) for check in verdicts[1].checks]
    assert "<b>|x\\x1b" in suites[0].attrib["name"]
    page = to_markdown(verdicts)
    assert page.startswith("## Gate: Failed: 1 of 2 runs\n") and "\x1b" not in page and "\\<b\\>\\|x" in page
    assert page.count("\n| FAILED | ") == 2 and page.count("\n| passed | ") == 2
    assert gate_title(verdicts[:1]) == "Passed" and gate_title(verdicts[1:]) == "Failed: 2 of 2 checks"


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["max_drop", "max_drop_dataset", "max_kept", "min_speedup", "non_inferior"])
def test_limits_are_finite_numbers_of_0_or_more(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"--{name} is {value}; it must be a number, 0 or more"):
        Limits(**{name: value})


def test_max_kept_is_a_share() -> None:
    with pytest.raises(UsageError, match="--max_kept is 20; it must be a share"):
        Limits(max_kept=20)
