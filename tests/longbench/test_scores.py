"""Scores of datasets against the official scorer, computed by hand, and with warnings about files."""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecache.errors import UsageError
from sparsecache.longbench.report import result_json
from sparsecache.longbench.score_types import DatasetScore, RowScore, Summary, bucket
from sparsecache.longbench.scores import ScoringOptions, score_file, score_run
from sparsecache.longbench.tasks import load_tasks
from tests.longbench.scoring import row, save, score

RunPython = Callable[..., CompletedProcess[str]]


QASPER = load_tasks()["qasper"]


REAL = ["pred/llama2-7b-chat-quest-1024", "pred/Qwen2.5-1.5B", "pred_e/llama3-8b-inst"]


@pytest.mark.parametrize("folder", REAL)
def test_real_predictions_get_the_official_scores(fixtures_dir: Path, folder: str) -> None:
    expected = json.loads((fixtures_dir / "expected_official.json").read_bytes())
    assert sorted(expected) == sorted(REAL)
    result = score_run(fixtures_dir / folder, e=folder.startswith("pred_e"))
    assert result_json(result) == expected[folder]
    assert list(result_json(result)) == [name for name in load_tasks() if name in expected[folder]]
    assert not result.complete


def test_stack_depth_and_levenshtein_do_not_change_scores(
    fixtures_dir: Path, tmp_path: Path, run_python: RunPython
) -> None:
    (tmp_path / "Levenshtein.py").write_text("def ratio(first, second):\n    return 0.77\n")
    code = (
        "import json, sys; from pathlib import Path\n"
        "import Levenshtein\n"
        "from sparsecache.longbench.report import result_json\n"
        "from sparsecache.longbench.scores import ScoringOptions, score_file, score_run\n"
        "from sparsecache.longbench.tasks import load_tasks\n"
        "root = Path(sys.argv[1])\n"
        "runs = json.loads((root / 'expected_official.json').read_bytes())\n"
        "def scores():\n"
        "    return {run: result_json(score_run(root / run, run.startswith('pred_e'))) for run in runs}\n"
        "def deep(frames):\n"
        "    return deep(frames - 1) if frames else scores()\n"
        "lcc = root / 'pred/Qwen2.5-1.5B/lcc.jsonl'\n"
        "second = score_file(lcc, load_tasks()['lcc'], False, None, ScoringOptions(edit_backend='fuzzywuzzy'))\n"
        "print(json.dumps([deep(900), second.summary.score]))\n"
    )
    done = run_python("-c", code, fixtures_dir, path=(tmp_path,))
    assert done.returncode == 0, done.stderr
    found, second = json.loads(done.stdout)
    assert found == json.loads((fixtures_dir / "expected_official.json").read_bytes())
    assert second == 77.0


@pytest.mark.parametrize(
    ("length", "name"),
    [(0, "0-4k"), (3999, "0-4k"), (4000, "4-8k"), (7999, "4-8k"), (8000, "8k+"), (10**6, "8k+")],
)
def test_buckets(length: int, name: str) -> None:
    assert bucket(length) == name


def test_buckets_contain_rows_by_length(tmp_path: Path) -> None:
    lengths = [3999, 4000, 7999, 8000.0, 3999]
    rows = [row(number, "yes" if number % 2 else "no", length=length) for number, length in enumerate(lengths)]
    result = score(tmp_path, rows, "qasper_e")
    assert {name: (part.score, part.n) for name, part in result.buckets.items()} == {
        "0-4k": (0.0, 2),
        "4-8k": (50.0, 2),
        "8k+": (100.0, 1),
    }
    assert result.warnings == []


def test_an_empty_bucket_is_none(tmp_path: Path) -> None:
    save(tmp_path, "qasper_e", [row(0, length=5000)])
    result = score_run(tmp_path, e=True)
    assert result_json(result) == {"qasper": {"0-4k": None, "4-8k": 100.0, "8k+": None}}
    assert result.datasets[0].buckets["8k+"] == Summary(None, None, 0)


SCORES = st.lists(st.integers(0, 100).map(lambda percent: percent / 100) | st.floats(0, 1), min_size=1, max_size=300)


@given(SCORES)
def test_means_are_rounded_as_in_the_reference(scores: list[float]) -> None:
    rows = [RowScore(value, 5000, False, False, False, False) for value in scores]
    total = 0.0
    for value in scores:
        total += value
    result = DatasetScore(QASPER, True, rows, len(rows), [])
    assert result.summary.score == round(100 * total / len(scores), 2)
    assert result.buckets["4-8k"].score == float(round(100 * numpy.mean(scores), 2))


def test_buckets_are_rounded_by_numpy() -> None:
    # 13 of 4000: numpy gives 0.32 where Python gives 0.33.
    rows = [RowScore(float(number < 13), 1, False, False, False, False) for number in range(4000)]
    result = DatasetScore(QASPER, True, rows, 4000, [])
    assert (result.buckets["0-4k"].score, result.summary.score) == (0.32, 0.33)


def test_scores_are_added_left_to_right() -> None:
    # Added exactly, as `sum` has it since Python 3.12, these make 39.12.
    values = [0.97, 0.18, 0.03, 0.15, 0.9, 0.55, 0.31, 0.04]
    rows = [RowScore(value, 1, False, False, False, False) for value in values]
    assert DatasetScore(QASPER, False, rows, 8, []).summary.score == 39.13


def test_the_standard_error_is_of_the_mean(tmp_path: Path) -> None:
    rows = [row(0), row(1), row(2, "no"), row(3, "yes and no")]
    summary = score(tmp_path, rows).summary
    values = [1.0, 1.0, 0.0, 0.5]
    assert summary.score == 62.5
    assert summary.stderr == pytest.approx(100 * statistics.stdev(values) / math.sqrt(4))
    assert score(tmp_path, rows[:1]).summary == Summary(100.0, None, 1)


def test_the_best_answer_counts_and_no_answers_give_zero(tmp_path: Path) -> None:
    rows = [row(0, answers=["no", "yes", "maybe"]), row(1, answers=[])]
    result = score(tmp_path, rows)
    assert [item.score for item in result.rows] == [1.0, 0.0]


@pytest.mark.parametrize("name", ["trec", "triviaqa", "samsum", "lsht", "qasper", "gov_report"])
def test_only_the_first_line_counts_for_few_shot_datasets(tmp_path: Path, name: str) -> None:
    rows = [row(0, "\n\nyes\nno no no", all_classes=["yes", "no"])]
    first_line_only = name in ("trec", "triviaqa", "samsum", "lsht")
    assert (score(tmp_path, rows, name).summary.score == 100.0) == first_line_only


def test_classes_come_from_the_last_row(tmp_path: Path) -> None:
    rows = [row(0, "yes no", all_classes=["yes", "no"]), row(1, "yes", all_classes=["yes"])]
    assert [item.score for item in score(tmp_path, rows, "trec").rows] == [1.0, 1.0]


def test_error_rows_count_zero_and_are_not_empty(tmp_path: Path) -> None:
    result = score(tmp_path, [row(0), row(1, "", error="OutOfMemoryError"), row(2, " \n")])
    assert result.summary.score == 33.33
    assert [result.count(name) for name in ("error_row", "empty", "metric_error")] == [1, 1, 0]
    assert (result.num_finished, result.complete) == (2, False)
    assert result.warnings == [
        "1 of 3 predictions are empty",
        "1 error rows count 0.0; run the prediction again to retry them",
    ]


def test_metric_errors_count_zero_and_warn_above_one_percent(tmp_path: Path) -> None:
    rows = [row(number) for number in range(100)]
    one, two = [*rows[:99], row(99, "...")], [*rows[:98], row(98, "..."), row(99, ".")]
    assert score(tmp_path, one, "gov_report").count("metric_error") == 1
    assert score(tmp_path, one, "gov_report").warnings == []
    assert score(tmp_path, two, "gov_report").warnings == ["2 of 100 predictions could not be scored and count 0.0"]
    assert score(tmp_path, [row(0, "", answers=["Paragraph 1"])], "passage_retrieval_en").count("metric_error") == 0
    assert score(tmp_path, [row(0, "1", answers=["1"])], "passage_retrieval_en").count("metric_error") == 1


def test_rows_beyond_the_recursion_limit_are_counted(tmp_path: Path) -> None:
    long = " ".join(f"w{number}" for number in range(1200))
    result = score(tmp_path, [row(0, "w0", answers=[long])], "gov_report")
    assert result.count("recursion_exceeded") == 1
    assert result.rows[0].score > 0
    assert result.warnings == ["1 rows get 0.0 from the reference scorer (recursion limit)"]
    official = score(tmp_path, [row(0, "w0", answers=[long])], "gov_report", official_recursion=True)
    assert (official.rows[0].score, official.count("recursion_exceeded")) == (0.0, 1)


def test_files_of_other_programs_are_scored_with_warnings(tmp_path: Path) -> None:
    rows = [row(number, "yes" if number else "no", _id=..., length=...) for number in range(4)]
    result = score(tmp_path, rows, "qasper_e")
    assert result.summary.score == 75.0
    assert result.warnings == [
        "4 rows have no _id, so repeats cannot be detected",
        "rows have no length and are in no bucket",
    ]
    assert all(part.n == 0 for part in result.buckets.values())
    shuffled = score(tmp_path, rows[::-1])
    assert shuffled.summary == result.summary
    twice = score_file(save(tmp_path, "qasper", rows * 2), QASPER, False, None, ScoringOptions())
    assert (twice.summary.score, len(twice.rows), twice.complete) == (75.0, 8, False)
    assert score(tmp_path, [row(0, _id=None), row(1, _id=None)]).warnings[0].startswith("2 rows have no _id")


def test_line_ends_change_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, "qasper", [row(0), row(1, "no\r\n\x85\u2028")], end="")
    expected = score_file(path, QASPER, False, 2, ScoringOptions()).rows
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert score_file(path, QASPER, False, 2, ScoringOptions()).rows == expected


def test_repeated_ids_are_refused_unless_allowed(tmp_path: Path) -> None:
    rows = [row(0), row(1, "no"), row(0)]
    with pytest.raises(UsageError, match=r"qasper\.jsonl repeats 1 _ids.*--allow_duplicates"):
        score(tmp_path, rows)
    result = score(tmp_path, rows, allow_duplicates=True)
    assert result.summary.score == 66.67
    assert result.warnings == ["1 rows repeat an _id and count again"]


def test_an_empty_file_has_no_score(tmp_path: Path) -> None:
    save(tmp_path, "qasper", [])
    save(tmp_path, "trec", [row(0, all_classes=["yes"])])
    result = score_run(tmp_path)
    assert result_json(result) == {"qasper": None, "trec": 100.0}
    assert not result.complete
    assert result.averages["flat_mean"].datasets == 1


@pytest.mark.parametrize(
    "broken",
    [
        {"pred": ...},
        {"pred": None},
        {"pred": ["yes"]},
        {"answers": ...},
        {"answers": "yes"},
        {"answers": [1]},
        {"answers": None},
    ],
)
def test_a_row_that_is_not_a_prediction_is_refused(tmp_path: Path, broken: dict[str, Any]) -> None:
    with pytest.raises(
        UsageError, match=r"qasper\.jsonl, line 2: (pred|answers)\S* is .*(must be a|a row needs `pred`)"
    ):
        score(tmp_path, [row(0), row(1, **broken)])


def test_a_truncated_line_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, "qasper", [row(0), row(1)])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UsageError, match=r"qasper\.jsonl, line 2: line contains invalid json"):
        score_run(tmp_path)


def test_rouge_score_equals_the_package_and_handles_chinese(tmp_path: Path) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    rows = [
        row(0, "The dog runs today.", answers=["A dog was running.", "The dog ran today"]),
        row(1, "", answers=["x"]),
        row(2, answers=[]),
    ]
    found = score(tmp_path, rows, "gov_report", rouge_score=True).rouge_score
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    best = scorer.score_multi(rows[0]["answers"], rows[0]["pred"])
    assert found == {name: round(100 * best[name].fmeasure / 3, 2) for name in best}
    assert found["rouge1"] > found["rouge2"] > 0
    chinese = [row(0, "会议讨论了消费。", answers=["会议，讨论消费"])]
    assert score(tmp_path, chinese, "vcsum", rouge_score=True).rouge_score == {
        # 会议 讨论 了 消费 against 会议 讨论 消费
        "rouge1": 85.71,
        "rouge2": 40.0,
        "rougeL": 85.71,
    }
    assert score(tmp_path, rows, "gov_report").rouge_score is None
    assert score(tmp_path, rows, "qasper", rouge_score=True).rouge_score is None
