"""Scores: the official scorer's on real files, its arithmetic by hand, and what is odd about files from elsewhere."""

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

from sparsecache.configs import read_tables
from sparsecache.errors import UsageError
from sparsecache.longbench.report import result_json
from sparsecache.longbench.scores import DatasetScore, Options, RowScore, Summary, bucket, score_file, score_run
from sparsecache.longbench.tasks import load_tasks

RunPython = Callable[..., CompletedProcess[str]]
QASPER = load_tasks()["qasper"]


def row(number: int, pred: str = "yes", **more: Any) -> dict[str, Any]:
    made = {"pred": pred, "answers": ["yes"], "all_classes": None, "length": 100, "_id": str(number)}
    return {key: value for key, value in {**made, **more}.items() if value is not ...}


def save(folder: Path, stem: str, rows: list[dict[str, Any]], end: str = "\n") -> Path:
    path = folder / f"{stem}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + end if rows else "", encoding="utf-8", newline="\n")
    return path


def score(folder: Path, rows: list[dict[str, Any]], stem: str = "qasper", **options: Any) -> DatasetScore:
    """The score of a file of these rows, of which run.json expects just as many."""
    path = save(folder, stem, rows)
    task = load_tasks()[stem.removesuffix("_e")]
    return score_file(path, task, stem.endswith("_e"), len(rows), Options(**options))


def expect_rows(folder: Path, **rows: int) -> None:
    record = {"datasets": {stem: {"expected_rows": count} for stem, count in rows.items()}}
    (folder / "run.json").write_text(json.dumps(record))


REAL = ["pred/llama2-7b-chat-quest-1024", "pred/Qwen2.5-1.5B", "pred_e/llama3-8b-inst"]


@pytest.mark.parametrize("folder", REAL)
def test_real_predictions_score_as_the_official_scorer_has_it(fixtures_dir: Path, folder: str) -> None:
    expected = json.loads((fixtures_dir / "expected_official.json").read_bytes())
    assert sorted(expected) == sorted(REAL)
    result = score_run(fixtures_dir / folder, e=folder.startswith("pred_e"))
    assert result_json(result) == expected[folder]
    assert list(result_json(result)) == [name for name in load_tasks() if name in expected[folder]]
    assert not result.complete


def test_neither_the_call_stack_nor_levenshtein_changes_them(
    fixtures_dir: Path, tmp_path: Path, run_python: RunPython
) -> None:
    (tmp_path / "Levenshtein.py").write_text("def ratio(first, second):\n    return 0.77\n")
    code = (
        "import json, sys; from pathlib import Path\n"
        "import Levenshtein\n"
        "from sparsecache.longbench.report import result_json\n"
        "from sparsecache.longbench.scores import Options, score_file, score_run\n"
        "from sparsecache.longbench.tasks import load_tasks\n"
        "root = Path(sys.argv[1])\n"
        "runs = json.loads((root / 'expected_official.json').read_bytes())\n"
        "def scores():\n"
        "    return {run: result_json(score_run(root / run, run.startswith('pred_e'))) for run in runs}\n"
        "def deep(frames):\n"
        "    return deep(frames - 1) if frames else scores()\n"
        "lcc = root / 'pred/Qwen2.5-1.5B/lcc.jsonl'\n"
        "second = score_file(lcc, load_tasks()['lcc'], False, None, Options(edit_backend='fuzzywuzzy'))\n"
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


def test_buckets_hold_the_rows_of_their_length(tmp_path: Path) -> None:
    lengths = [3999, 4000, 7999, 8000.0, 3999]
    rows = [row(number, "yes" if number % 2 else "no", length=length) for number, length in enumerate(lengths)]
    result = score(tmp_path, rows, "qasper_e")
    assert {name: (part.score, part.n) for name, part in result.buckets.items()} == {
        "0-4k": (0.0, 2),
        "4-8k": (50.0, 2),
        "8k+": (100.0, 1),
    }
    assert result.warnings == []


def test_an_empty_bucket_is_null(tmp_path: Path) -> None:
    save(tmp_path, "qasper_e", [row(0, length=5000)])
    result = score_run(tmp_path, e=True)
    assert result_json(result) == {"qasper": {"0-4k": None, "4-8k": 100.0, "8k+": None}}
    assert result.datasets[0].buckets["8k+"] == Summary(None, None, 0)


SCORES = st.lists(st.integers(0, 100).map(lambda percent: percent / 100) | st.floats(0, 1), min_size=1, max_size=300)


@given(SCORES)
def test_means_are_rounded_as_the_reference_rounds_them(scores: list[float]) -> None:
    rows = [RowScore(value, 5000, False, False, False, False) for value in scores]
    total = 0.0
    for value in scores:
        total += value
    result = DatasetScore(QASPER, True, rows, len(rows), [])
    assert result.summary.score == round(100 * total / len(scores), 2)
    assert result.buckets["4-8k"].score == float(round(100 * numpy.mean(scores), 2))


def test_numpy_rounds_a_bucket_its_own_way() -> None:
    # 13 of 4000: numpy gives 0.32 where Python gives 0.33.
    rows = [RowScore(float(number < 13), 1, False, False, False, False) for number in range(4000)]
    result = DatasetScore(QASPER, True, rows, 4000, [])
    assert (result.buckets["0-4k"].score, result.summary.score) == (0.32, 0.33)


def test_scores_are_added_one_after_the_other() -> None:
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


def test_the_best_answer_counts_and_no_answer_is_zero(tmp_path: Path) -> None:
    rows = [row(0, answers=["no", "yes", "maybe"]), row(1, answers=[])]
    result = score(tmp_path, rows)
    assert [item.score for item in result.rows] == [1.0, 0.0]


@pytest.mark.parametrize("name", ["trec", "triviaqa", "samsum", "lsht", "qasper", "gov_report"])
def test_only_the_first_line_counts_for_the_few_shot_sets(tmp_path: Path, name: str) -> None:
    rows = [row(0, "\n\nyes\nno no no", all_classes=["yes", "no"])]
    first_line_only = name in ("trec", "triviaqa", "samsum", "lsht")
    assert (score(tmp_path, rows, name).summary.score == 100.0) == first_line_only


def test_classes_are_those_of_the_last_row(tmp_path: Path) -> None:
    rows = [row(0, "yes no", all_classes=["yes", "no"]), row(1, "yes", all_classes=["yes"])]
    assert [item.score for item in score(tmp_path, rows, "trec").rows] == [1.0, 1.0]


def test_averages_are_means_of_category_means(tmp_path: Path) -> None:
    # One row each: right in the first of a category, wrong or half right in the others.
    texts = {
        "qasper": ("yes", 100.0),
        "narrativeqa": ("no", 0.0),
        "multifieldqa_zh": ("yes", 100.0),
        "hotpotqa": ("yes or", 66.67),
        "trec": ("yes", 100.0),
        "lsht": ("no", 0.0),
        "passage_count": ("1 2", 50.0),
        "lcc": ("yes", 100.0),
        "repobench-p": ("no", 0.0),
    }
    for name, (pred, _) in texts.items():
        answers = ["1"] if name == "passage_count" else ["yes"]
        save(tmp_path, name, [row(0, pred, answers=answers, all_classes=["yes", "no"])])
    result = score_run(tmp_path)
    assert {name: value for name, (_, value) in texts.items()} == {
        dataset.task.name: dataset.summary.score for dataset in result.datasets
    }
    categories = {name: (mean.score, mean.datasets, mean.of) for name, mean in result.categories.items()}
    assert categories == {
        "single_doc_qa": (pytest.approx(200 / 3), 3, 4),
        "multi_doc_qa": (66.67, 1, 4),
        "summarization": (None, 0, 4),
        "few_shot": (50.0, 2, 4),
        "synthetic": (50.0, 1, 3),
        "code": (50.0, 2, 2),
    }
    averages = {name: (mean.score, mean.datasets, mean.of, mean.n) for name, mean in result.averages.items()}
    assert averages == {
        "avg_en": (pytest.approx((50 + 66.67 + 100 + 50 + 50) / 5), 7, 16, 7),
        "avg_zh": (pytest.approx((100 + 0 + 50) / 3), 4, 7, 4),
        "avg_all": (pytest.approx((200 / 3 + 66.67 + 50 + 50 + 50) / 5), 9, 21, 9),
        "flat_mean": (pytest.approx((300 + 66.67 + 50 + 100) / 9), 9, 21, 9),
    }
    assert result.averages["avg_en"].partial and not result.categories["code"].partial


def test_the_error_of_an_average_is_that_of_independent_means(tmp_path: Path) -> None:
    for name in ("qasper", "hotpotqa"):
        save(tmp_path, name, [row(0), row(1, "no")])
    result = score_run(tmp_path)
    single = 100 * statistics.stdev([1.0, 0.0]) / math.sqrt(2)
    assert result.averages["avg_en"].stderr == pytest.approx(math.sqrt(2 * single**2) / 2)
    save(tmp_path, "musique", [row(0)])
    assert score_run(tmp_path).averages["avg_en"].stderr is None


def test_averages_of_longbench_e_count_its_13_sets(tmp_path: Path) -> None:
    save(tmp_path, "qasper_e", [row(0)])
    averages = score_run(tmp_path, e=True).averages
    assert {name: (mean.datasets, mean.of) for name, mean in averages.items()} == {
        "avg_en": (1, 13),
        "avg_zh": (0, averages["avg_zh"].of),
        "avg_all": (1, 13),
        "flat_mean": (1, 13),
    }


def test_expected_rows_come_from_run_json_else_from_the_benchmark(tmp_path: Path) -> None:
    save(tmp_path, "qasper", [row(0), row(1)])
    result = score_run(tmp_path)
    assert (result.datasets[0].expected, result.complete) == (200, False)
    assert "no run.json tells how many rows were asked for, so the published number is expected" in (
        result.datasets[0].warnings
    )
    expect_rows(tmp_path, qasper=2)
    result = score_run(tmp_path)
    assert (result.datasets[0].expected, result.complete, result.datasets[0].warnings) == (2, True, [])
    expect_rows(tmp_path, qasper=3)
    assert not score_run(tmp_path).complete


def test_more_rows_than_expected_are_no_complete_run(tmp_path: Path) -> None:
    save(tmp_path, "qasper", [row(0), row(1)])
    expect_rows(tmp_path, qasper=1)
    result = score_run(tmp_path)
    assert not result.complete
    assert result.datasets[0].warnings == ["more rows than expected: appended re-runs?"]


def test_error_rows_count_zero_and_are_told_from_empty_ones(tmp_path: Path) -> None:
    result = score(tmp_path, [row(0), row(1, "", error="OutOfMemoryError"), row(2, " \n")])
    assert result.summary.score == 33.33
    assert [result.count(name) for name in ("error_row", "empty", "metric_error")] == [1, 1, 0]
    assert (result.finished, result.complete) == (2, False)
    assert result.warnings == [
        "1 of 3 predictions are empty",
        "1 error rows count 0.0; run the prediction again to retry them",
    ]


def test_metric_errors_count_zero_and_are_shown_above_one_percent(tmp_path: Path) -> None:
    rows = [row(number) for number in range(100)]
    one, two = [*rows[:99], row(99, "...")], [*rows[:98], row(98, "..."), row(99, ".")]
    assert score(tmp_path, one, "gov_report").count("metric_error") == 1
    assert score(tmp_path, one, "gov_report").warnings == []
    assert score(tmp_path, two, "gov_report").warnings == ["2 of 100 predictions could not be scored and count 0.0"]
    assert score(tmp_path, [row(0, "", answers=["Paragraph 1"])], "passage_retrieval_en").count("metric_error") == 0
    assert score(tmp_path, [row(0, "1", answers=["1"])], "passage_retrieval_en").count("metric_error") == 1


def test_rows_too_deep_for_the_reference_are_counted(tmp_path: Path) -> None:
    long = " ".join(f"w{number}" for number in range(1200))
    result = score(tmp_path, [row(0, "w0", answers=[long])], "gov_report")
    assert result.count("too_deep") == 1
    assert result.rows[0].score > 0
    assert result.warnings == ["1 rows get 0.0 from the reference scorer (recursion limit)"]
    official = score(tmp_path, [row(0, "w0", answers=[long])], "gov_report", official_recursion=True)
    assert (official.rows[0].score, official.count("too_deep")) == (0.0, 1)


def test_a_file_from_elsewhere_scores_with_a_word_on_what_is_odd(tmp_path: Path) -> None:
    rows = [row(number, "yes" if number else "no", _id=..., length=...) for number in range(4)]
    result = score(tmp_path, rows, "qasper_e")
    assert result.summary.score == 75.0
    assert result.warnings == [
        "4 rows have no _id, so repeats cannot be seen",
        "rows have no length and are in no bucket",
    ]
    assert all(part.n == 0 for part in result.buckets.values())
    shuffled = score(tmp_path, rows[::-1])
    assert shuffled.summary == result.summary
    twice = score_file(save(tmp_path, "qasper", rows * 2), QASPER, False, None, Options())
    assert (twice.summary.score, len(twice.rows), twice.complete) == (75.0, 8, False)
    assert score(tmp_path, [row(0, _id=None), row(1, _id=None)]).warnings[0].startswith("2 rows have no _id")


def test_windows_line_ends_and_a_missing_last_newline_change_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, "qasper", [row(0), row(1, "no\r\n\x85\u2028")], end="")
    expected = score_file(path, QASPER, False, 2, Options()).rows
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert score_file(path, QASPER, False, 2, Options()).rows == expected


def test_repeated_ids_are_refused_or_counted_on_demand(tmp_path: Path) -> None:
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
def test_a_row_that_is_no_prediction_is_refused(tmp_path: Path, broken: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"qasper\.jsonl, row 2: a row needs `pred` \(text\) and `answers`"):
        score(tmp_path, [row(0), row(1, **broken)])


def test_a_half_written_line_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, "qasper", [row(0), row(1)])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UsageError, match=r"qasper\.jsonl, line 2: line contains invalid json"):
        score_run(tmp_path)


@pytest.mark.parametrize(
    ("names", "e", "message"),
    [
        ([], False, "holds no <dataset>.jsonl file"),
        (["qasper", "qaspar"], False, r"files of no known dataset: qaspar\.jsonl\. Datasets: narrativeqa"),
        (["lsht"], True, "none belongs to LongBench-E"),
        (["lsht_e"], True, r"files of no known dataset: lsht_e\.jsonl"),
        (["qasper_e"], False, r"all are LongBench-E's \(add --e\)"),
    ],
)
def test_a_folder_without_files_to_score_is_refused(tmp_path: Path, names: list[str], e: bool, message: str) -> None:
    for name in names:
        save(tmp_path, name, [row(0)])
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match=message):
        score_run(tmp_path, e)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no folder .*nowhere\. Give --model and --name"):
        score_run(tmp_path / "nowhere")


def test_longbench_e_files_are_preferred_and_plain_ones_stand_in(tmp_path: Path) -> None:
    save(tmp_path, "qasper", [row(0, "no")])
    save(tmp_path, "vcsum", [row(0)])
    assert result_json(score_run(tmp_path, e=True)) == {"qasper": {"0-4k": 0.0, "4-8k": None, "8k+": None}}
    save(tmp_path, "trec_e", [row(0, all_classes=["yes"])])
    assert result_json(score_run(tmp_path, e=True)) == {"trec": {"0-4k": 100.0, "4-8k": None, "8k+": None}}
    assert list(result_json(score_run(tmp_path))) == ["qasper", "vcsum"]


def test_rouge_score_is_the_packages_mean_and_sees_chinese(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("language", ["en", "zh", "code"])
def test_a_dataset_of_ones_own_is_scored_but_in_no_average(
    tmp_path: Path, language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("qasper", "lcc", "vcsum"):
        save(tmp_path, name, [row(0)])
    expect_rows(tmp_path, qasper=1, lcc=1, vcsum=1)
    without = score_run(tmp_path)
    fields = {"template": "{context}", "max_new_tokens": 8, "metric": "token_f1", "category": "code"}
    tables = {**read_tables("datasets.toml"), "mine": {**fields, "language": language}}
    monkeypatch.setattr("sparsecache.longbench.tasks.read_tables", lambda name: tables)
    save(tmp_path, "mine", [row(0), row(1, "no"), row(2, "no")])
    expect_rows(tmp_path, qasper=1, lcc=1, vcsum=1, mine=3)
    result = score_run(tmp_path)
    assert result_json(result) == {**result_json(without), "mine": 33.33}
    assert (result.averages, result.categories) == (without.averages, without.categories)
    assert result.complete
    expect_rows(tmp_path)
    assert [dataset.complete for dataset in score_run(tmp_path).datasets] == [False, False, False, True]


@pytest.mark.parametrize(
    ("names", "averaged"),
    [
        (["lcc"], {"flat_mean"}),
        (["lcc", "repobench-p"], {"flat_mean"}),
        (["lcc", "qasper"], {"avg_en", "flat_mean"}),
        (["lcc", "vcsum"], {"avg_zh", "flat_mean"}),
        (["qasper", "vcsum"], {"avg_en", "avg_zh", "flat_mean"}),
    ],
    ids=lambda value: ",".join(sorted(value)),
)
def test_code_alone_is_no_average_of_a_language(tmp_path: Path, names: list[str], averaged: set[str]) -> None:
    for name in names:
        save(tmp_path, name, [row(0)])
    averages = score_run(tmp_path).averages
    del averages["avg_all"]
    assert {name for name, mean in averages.items() if mean.datasets} == averaged
    assert {name for name, mean in averages.items() if mean.score is not None} == averaged


@pytest.mark.parametrize("e", [False, True])
def test_a_file_that_run_json_expects_and_that_is_not_there_is_incomplete(tmp_path: Path, e: bool) -> None:
    stems = [f"{name}_e" if e else name for name in ("qasper", "trec")]
    save(tmp_path, stems[1], [row(0, all_classes=["yes"])])
    expect_rows(tmp_path, **{stems[0]: 7, stems[1]: 1})
    result = score_run(tmp_path, e)
    found = {each.task.name: (each.finished, each.expected, each.complete) for each in result.datasets}
    assert found == {"qasper": (0, 7, False), "trec": (1, 1, True)}
    (missing,) = (each for each in result.datasets if each.task.name == "qasper")
    assert missing.warnings == ["its file is missing"] and missing.summary.score is None
    assert not result.complete
    assert result.averages["flat_mean"].datasets == 1


def test_plain_files_stand_in_for_longbench_e_only_where_no_run_json_names_datasets(tmp_path: Path) -> None:
    save(tmp_path, "qasper", [row(0)])
    assert list(result_json(score_run(tmp_path, e=True))) == ["qasper"]
    (tmp_path / "run.json").write_text("{}")
    assert list(result_json(score_run(tmp_path, e=True))) == ["qasper"]
    expect_rows(tmp_path, qasper=1)
    with pytest.raises(UsageError, match="none belongs to LongBench-E"):
        score_run(tmp_path, e=True)


def test_what_was_kept_is_averaged_as_the_scores_are(tmp_path: Path) -> None:
    shares = {"qasper": [0.1, 0.3], "multifieldqa_en": [None], "hotpotqa": [0.4], "lcc": [0.8], "vcsum": [0.9]}
    for stem, values in shares.items():
        save(tmp_path, stem, [{**row(number), "kept": value} for number, value in enumerate(values)])
    expect_rows(tmp_path, **{stem: len(values) for stem, values in shares.items()})
    result = score_run(tmp_path)
    assert {score.task.name: score.kept and score.kept.share for score in result.datasets} == {
        "multifieldqa_en": None, "qasper": 0.2, "hotpotqa": 0.4, "vcsum": 0.9, "lcc": 0.8,
    }  # fmt: skip
    kept = {name: mean.kept for name, mean in (result.categories | result.averages).items() if mean.kept is not None}
    assert kept == pytest.approx(
        {
            "single_doc_qa": 0.2, "multi_doc_qa": 0.4, "summarization": 0.9, "code": 0.8,
            "avg_en": (0.2 + 0.4 + 0.8) / 3, "avg_zh": 0.85, "avg_all": (0.2 + 0.4 + 0.9 + 0.8) / 4,
            "flat_mean": (0.2 + 0.4 + 0.9 + 0.8) / 4,
        }
    )  # fmt: skip
    save(tmp_path, "qasper", [row(0), row(1)])
    assert [score.kept for score in score_run(tmp_path).datasets if score.task.name == "qasper"] == [None]
