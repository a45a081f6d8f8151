"""Cache methods of one's own in whole runs: options, reports, and a method that does nothing."""

from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result
from transformers import AutoTokenizer

ROWS = 3  # as conftest.py asks for


def test_a_method_of_ones_own_runs_by_its_file_name_and_its_options_are_recorded(
    predict, folder, add_method, read_rows, read_record
) -> None:
    add_method("""
        def __init__(self, budget: int = 64, share: float = 0.5):
            self.budget = budget

        def report(self, slot):
            return {"kept": self.budget}
    """)
    assert predict("--method", "mine", "-o", "budget=64", "--name", "mine").exit_code == 0
    assert read_record(folder.parent / "mine")["identity"]["options"] == {"budget": 64, "share": 0.5}
    assert {row["kept"] for row in read_rows(folder.parent / "mine" / "qasper.jsonl")} == {64}
    assert predict("--method", "mine").exit_code == 0  # the default, said or not, is the same run
    told = predict("--method", "mine", "-o", "budget=65", "--name", "mine")
    assert told.exit_code == 2
    assert "with other settings: budget: 64, now 65. Choose" in told.stderr
    assert predict("--method", "mine", "-o", "share=0.5", "-o", "budget=65").exit_code == 0
    assert read_record(folder.parent / "mine-budget=65-share=0.5")["identity"]["options"]["budget"] == 65


def test_a_calibration_text_is_shown_to_the_method_before_the_first_prompt(
    predict, folder, tiny, add_method, read_untimed, read_record
) -> None:
    module = add_method("""
        seen = []

        def calibration_text(self):
            return "The lighthouse keeper counted the ships."

        def calibrate(self, layer, q, k):
            self.seen.append(("calibrate", layer, tuple(q.shape), tuple(k.shape)))

        def make_cache(self, layer, config):
            self.seen.append(("make_cache", layer))
            return super().make_cache(layer, config)
    """)
    assert predict("--method", "mine").exit_code == 0
    text = module.Mine().calibration_text()
    length = len(AutoTokenizer.from_pretrained(tiny)(text)["input_ids"])
    assert module.Mine.seen[:2] == [("calibrate", 0, (1, 2, length, 16), (1, length, 16)), ("make_cache", 0)]
    assert set(module.Mine.seen[2:]) <= {("make_cache", 0)}
    assert predict().exit_code == 0
    assert read_untimed(folder.parent / "mine" / "qasper.jsonl") == read_untimed(folder / "qasper.jsonl")
    clocks = [read_record(place)["sessions"][0]["clock"] for place in (folder, folder.parent / "mine")]
    assert clocks[0]["prefill_tokens"] == clocks[1]["prefill_tokens"]


def test_an_infinite_option_is_recorded_and_is_the_same_run_again(predict, folder, add_method, read_record) -> None:
    add_method("def __init__(self, alpha: float = 5.0, least: float = float('-inf')):\n    pass")
    assert predict("--method", "mine", "-o", "alpha=inf", "--name", "mine", "--max_samples", "1").exit_code == 0
    assert read_record(folder.parent / "mine")["identity"]["options"] == {"alpha": "inf", "least": "-inf"}
    told = predict("--method", "mine", "-o", "alpha=inf", "--name", "mine")
    assert told.exit_code == 0 and "2 of 3 to do" in told.stdout and "mine (alpha=inf, least=-inf)" in told.stdout
    told = predict("--method", "mine")
    assert told.exit_code == 2
    assert "with other settings: alpha: inf, now 5.0. Choose" in told.stderr


SPARSE = {"kept": 0.25, "sparse_steps": 8, "dense_layers": 2, "capped_steps": 8}
WHOLE = {**SPARSE, "kept": 1.0}  # it could have dropped something
SHORT = {**WHOLE, "capped_steps": 0}  # it had no reason to
NO_STEP = {**SHORT, "kept": None, "sparse_steps": 0}


@pytest.fixture
def report(add_method, predict) -> Callable[..., Result]:
    """Runs a method that reports these of its three rows, one after the other."""
    kind = add_method("def report(self, slot):\n    return {}").Mine

    def run(reports: list[dict[str, Any]], *arguments: str) -> Result:
        left = iter(reports)
        kind.report = lambda self, slot: next(left)
        return predict("--method", "mine", *arguments)

    return run


@pytest.mark.parametrize(
    ("reports", "rows"),
    [
        ([WHOLE, WHOLE, WHOLE], 3),
        ([WHOLE, SHORT, NO_STEP], 1),
        ([WHOLE, WHOLE, SPARSE], 0),
        ([SHORT, SHORT, SHORT], 0),
        ([NO_STEP, NO_STEP, NO_STEP], 0),
        ([WHOLE, {**SHORT, "kept": 0.5}, SHORT], 1),
        ([{}, {}, {}], 0),
    ],
    ids=["nothing dropped", "where it could", "one dropped", "lossless", "no step", "below no cap", "full cache"],
)
def test_a_method_that_did_nothing_fails_the_run_loudly(reports, rows, report) -> None:
    told = report(reports)
    assert told.exit_code == (1 if rows else 0), told.output
    said = [line for line in told.stderr.splitlines() if line.startswith("Error: ")]
    assert len(said) == (rows > 0)
    if rows:
        assert f"Method mine did nothing: {rows} rows had more past tokens than its budget" in said[0]
        assert "--list_methods" in said[0] and "--overwrite" in said[0]


def test_old_rows_of_every_dataset_count_whether_a_method_did_something(report) -> None:
    assert report([WHOLE], "--max_samples", "1").exit_code == 1
    assert report([], "--max_samples", "1").exit_code == 1  # nothing to do, and still nothing done
    assert report([SPARSE, WHOLE]).exit_code == 0
    assert report([WHOLE] * 3, "--datasets", "trec").exit_code == 1
    told = report([], "--datasets", "qasper,trec")
    assert told.exit_code == 0 and "did nothing" not in told.stderr


def test_what_was_kept_stands_in_the_table_of_the_run(report, predict) -> None:
    told = report([SPARSE, {**SPARSE, "kept": 0.0125}, NO_STEP])
    lines = told.stdout.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("dataset "))
    assert (lines[start].split()[-1], lines[start + 2].split()[-1]) == ("kept", "13.1%")
    assert "Kept: mean share of past tokens attended to, over 16 sparse steps of 2 rows (1 more had no" in told.stdout
    assert "dense layers: 2" in told.stdout
    told = predict()
    assert "Kept:" not in told.stdout and " kept\n" not in told.stdout
