"""Reasoning up to `</think>`: what is scored, what is counted, and where a cut-off answer shows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsecache.longbench.compare import compare
from sparsecache.longbench.reasoning import SplitText, opens_reasoning, split_reasoning
from sparsecache.longbench.report import health_table, summary_json
from sparsecache.longbench.score_tables import score_document
from sparsecache.longbench.scores import ScoringOptions, score_run
from sparsecache.longbench.tasks import load_tasks
from tests.longbench.scoring import score_table


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("yes", False, SplitText("yes", False, False)),
        ("", False, SplitText("", False, False)),
        ("<think>no</think>\n\nyes", False, SplitText("yes", True, False)),
        ("no</think>\n\n  yes\n", True, SplitText("  yes\n", True, False)),
        ("no</think>yes", False, SplitText("yes", True, False)),
        ("<think>\n\n</think>\n\nyes", False, SplitText("yes", True, False)),
        ("<think>a</think>b<think>c</think>yes", False, SplitText("yes", True, False)),
        ("\n<think>never ends", False, SplitText("", True, True)),
        ("never ends", True, SplitText("", True, True)),
        ("", True, SplitText("", True, True)),
        ("the tag <think> in an answer", False, SplitText("the tag <think> in an answer", False, False)),
        ("<think>all</think>", False, SplitText("", True, False)),
    ],
)
def test_reasoning_is_split_from_the_answer(text: str, opened: bool, expected: SplitText) -> None:
    assert split_reasoning(text, opened) == expected


@pytest.mark.parametrize(
    ("end", "opened"),
    [("<|assistant|><think>\n", True), ("<think>", True), ("<think>\n\n</think>\n\n", False), ("Answer:", False)],
)
def test_a_prompt_may_open_the_reasoning(end: str, opened: bool) -> None:
    assert opens_reasoning(end) == opened


def test_predictions_of_other_programs_are_scored_without_their_reasoning(
    make_run: Callable[..., Path], row: Callable[..., dict[str, Any]]
) -> None:
    rows = [row(0, "<think>no no</think>\n\nyes"), row(1, "<think>yes yes yes"), row(2, "yes")]
    folder = make_run(
        "a", {"qasper": rows, "trec": [row(0, "<think>\nno\n</think>\n\nyes\nno", all_classes=["yes", "no"])]}
    )
    qasper, trec = score_run(folder).datasets
    assert [each.score for each in qasper.rows] == [1, 0, 1] and trec.summary.score == 100
    assert [each.ended_by_length for each in qasper.rows] == [False, True, False]
    assert (qasper.count("empty"), qasper.num_ended_by_length, trec.num_ended_by_length) == (0, 1, None)


def test_cut_off_answers_stand_in_the_score_table(
    make_run: Callable[..., Path], row: Callable[..., dict[str, Any]]
) -> None:
    cut = [
        row(0, finish_reason="stop"),
        row(1, finish_reason="length"),
        row(2, "", finish_reason="stop", unclosed_think=True, full_text="<think>x"),
        row(3, "", error="x"),
    ]
    run = score_run(make_run("a", {"qasper": cut, "hotpotqa": [row(0, finish_reason="stop")]}))
    lines = [line.split() for line in score_table(run).split("\n")]
    assert lines[1][-3:] == ["ended", "by", "length"]
    assert {line[0]: line[-1] for line in lines[3:5]} == {"qasper": "2", "hotpotqa": "0"}
    records = score_document(run).records
    at = list(records.header).index("ended_by_length")
    assert [each[at].value for each in records.data_rows[:2]] == [2, 0]
    assert summary_json(run, ScoringOptions())["datasets"]["qasper"]["ended_by_length"] == 2
    health = health_table([(load_tasks()["qasper"], "qasper", 4, cut)]).split("\n")
    assert health[2].split() == ["qasper", "4/4", "1", "0", "0", "2", "0", "0"]
    without = score_run(make_run("b", {"qasper": [row(0)]}))
    assert "ended by length" not in score_table(without)


def test_deviations_from_the_protocol_are_shown(
    make_run: Callable[..., Path], row: Callable[..., dict[str, Any]]
) -> None:
    folder = make_run("a", {"qasper": [row(0)]})
    record = json.loads((folder / "run.json").read_text())
    record["datasets"]["qasper"]["deviations"] = ["max_new_tokens is 1024 instead of 128"]
    (folder / "run.json").write_text(json.dumps(record))
    deviation = "not the protocol: max_new_tokens is 1024 instead of 128"
    assert deviation in score_table(score_run(folder))
    other = make_run("b", {"qasper": [row(0)]})
    assert f"a, qasper: {deviation}." in compare([score_run(other), score_run(folder)], resamples=9).notes
