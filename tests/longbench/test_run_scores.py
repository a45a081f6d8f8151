"""Scores of runs: averages over datasets, the choice of files, and expected rows."""

import math
import statistics
from pathlib import Path

import pytest

from sparsecache.configs import read_tables
from sparsecache.errors import UsageError
from sparsecache.longbench.report import result_json
from sparsecache.longbench.scores import score_run
from tests.longbench.scoring import expect_rows, row, save


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
    categories = {name: (mean.score, mean.datasets, mean.of_datasets) for name, mean in result.categories.items()}
    assert categories == {
        "single_doc_qa": (pytest.approx(200 / 3), 3, 4),
        "multi_doc_qa": (66.67, 1, 4),
        "summarization": (None, 0, 4),
        "few_shot": (50.0, 2, 4),
        "synthetic": (50.0, 1, 3),
        "code": (50.0, 2, 2),
    }
    averages = {name: (mean.score, mean.datasets, mean.of_datasets, mean.n) for name, mean in result.averages.items()}
    assert averages == {
        "avg_en": (pytest.approx((50 + 66.67 + 100 + 50 + 50) / 5), 7, 16, 7),
        "avg_zh": (pytest.approx((100 + 0 + 50) / 3), 4, 7, 4),
        "avg_all": (pytest.approx((200 / 3 + 66.67 + 50 + 50 + 50) / 5), 9, 21, 9),
        "flat_mean": (pytest.approx((300 + 66.67 + 50 + 100) / 9), 9, 21, 9),
    }
    assert result.averages["avg_en"].partial and not result.categories["code"].partial


def test_the_error_of_an_average_assumes_independent_means(tmp_path: Path) -> None:
    for name in ("qasper", "hotpotqa"):
        save(tmp_path, name, [row(0), row(1, "no")])
    result = score_run(tmp_path)
    single = 100 * statistics.stdev([1.0, 0.0]) / math.sqrt(2)
    assert result.averages["avg_en"].stderr == pytest.approx(math.sqrt(2 * single**2) / 2)
    save(tmp_path, "musique", [row(0)])
    assert score_run(tmp_path).averages["avg_en"].stderr is None


def test_averages_of_longbench_e_cover_13_datasets(tmp_path: Path) -> None:
    save(tmp_path, "qasper_e", [row(0)])
    averages = score_run(tmp_path, e=True).averages
    assert {name: (mean.datasets, mean.of_datasets) for name, mean in averages.items()} == {
        "avg_en": (1, 13),
        "avg_zh": (0, averages["avg_zh"].of_datasets),
        "avg_all": (1, 13),
        "flat_mean": (1, 13),
    }


def test_expected_rows_come_from_run_json_else_from_the_benchmark(tmp_path: Path) -> None:
    save(tmp_path, "qasper", [row(0), row(1)])
    result = score_run(tmp_path)
    assert (result.datasets[0].expected, result.complete) == (200, False)
    assert "run.json does not record the number of rows, so the published number is expected" in (
        result.datasets[0].warnings
    )
    expect_rows(tmp_path, qasper=2)
    result = score_run(tmp_path)
    assert (result.datasets[0].expected, result.complete, result.datasets[0].warnings) == (2, True, [])
    expect_rows(tmp_path, qasper=3)
    assert not score_run(tmp_path).complete


def test_more_rows_than_expected_are_not_complete(tmp_path: Path) -> None:
    save(tmp_path, "qasper", [row(0), row(1)])
    expect_rows(tmp_path, qasper=1)
    result = score_run(tmp_path)
    assert not result.complete
    assert result.datasets[0].warnings == ["more rows than expected: appended re-runs?"]


@pytest.mark.parametrize(
    ("names", "e", "message"),
    [
        ([], False, "holds no <dataset>.jsonl file"),
        (["qasper", "qaspar"], False, r"files of unknown datasets: qaspar\.jsonl\. Datasets: narrativeqa"),
        (["lsht"], True, "none belongs to LongBench-E"),
        (["lsht_e"], True, r"files of unknown datasets: lsht_e\.jsonl"),
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


def test_longbench_e_uses_plain_files_as_a_fallback(tmp_path: Path) -> None:
    save(tmp_path, "qasper", [row(0, "no")])
    save(tmp_path, "vcsum", [row(0)])
    assert result_json(score_run(tmp_path, e=True)) == {"qasper": {"0-4k": 0.0, "4-8k": None, "8k+": None}}
    save(tmp_path, "trec_e", [row(0, all_classes=["yes"])])
    assert result_json(score_run(tmp_path, e=True)) == {"trec": {"0-4k": 100.0, "4-8k": None, "8k+": None}}
    assert list(result_json(score_run(tmp_path))) == ["qasper", "vcsum"]


@pytest.mark.parametrize("language", ["en", "zh", "code"])
def test_a_custom_dataset_has_a_mean_of_its_own(tmp_path: Path, language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("qasper", "lcc", "vcsum"):
        save(tmp_path, name, [row(0)])
    expect_rows(tmp_path, qasper=1, lcc=1, vcsum=1)
    without = score_run(tmp_path)
    fields = {"template": "{context}", "max_new_tokens": 8, "metric": "token_f1", "category": "code"}
    tables = {**read_tables("datasets.toml"), "mine": {**fields, "language": language}}
    monkeypatch.setattr(
        "sparsecache.longbench.tasks.read_tables", lambda name: tables if name == "datasets.toml" else read_tables(name)
    )
    save(tmp_path, "mine", [row(0), row(1, "no"), row(2, "no")])
    expect_rows(tmp_path, qasper=1, lcc=1, vcsum=1, mine=3)
    result = score_run(tmp_path)
    assert result_json(result) == {**result_json(without), "mine": 33.33}
    own = result.averages.pop("own_mean")
    assert (own.score, own.datasets, own.of_datasets, own.n) == (33.33, 1, 1, 3)
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
def test_code_alone_gives_no_average(tmp_path: Path, names: list[str], averaged: set[str]) -> None:
    for name in names:
        save(tmp_path, name, [row(0)])
    averages = score_run(tmp_path).averages
    del averages["avg_all"]
    assert {name for name, mean in averages.items() if mean.datasets} == averaged
    assert {name for name, mean in averages.items() if mean.score is not None} == averaged


@pytest.mark.parametrize("e", [False, True])
def test_a_missing_expected_file_makes_the_run_incomplete(tmp_path: Path, e: bool) -> None:
    stems = [f"{name}_e" if e else name for name in ("qasper", "trec")]
    save(tmp_path, stems[1], [row(0, all_classes=["yes"])])
    expect_rows(tmp_path, **{stems[0]: 7, stems[1]: 1})
    result = score_run(tmp_path, e)
    found = {each.task.name: (each.num_finished, each.expected, each.complete) for each in result.datasets}
    assert found == {"qasper": (0, 7, False), "trec": (1, 1, True)}
    (missing,) = (each for each in result.datasets if each.task.name == "qasper")
    assert missing.warnings == ["its file is missing"] and missing.summary.score is None
    assert not result.complete
    assert result.averages["flat_mean"].datasets == 1


def test_the_fallback_to_plain_files_needs_a_missing_run_json(tmp_path: Path) -> None:
    save(tmp_path, "qasper", [row(0)])
    assert list(result_json(score_run(tmp_path, e=True))) == ["qasper"]
    (tmp_path / "run.json").write_text("{}")
    assert list(result_json(score_run(tmp_path, e=True))) == ["qasper"]
    expect_rows(tmp_path, qasper=1)
    with pytest.raises(UsageError, match="none belongs to LongBench-E"):
        score_run(tmp_path, e=True)


def test_kept_is_averaged_as_scores_are(tmp_path: Path) -> None:
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
