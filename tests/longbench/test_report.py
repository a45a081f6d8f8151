"""Printed tables and written JSON files: alignment, valid JSON, row counts and warnings.

In one file because tables and JSON are checked on the same scores.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsecache.configs import read_tables
from sparsecache.errors import UsageError
from sparsecache.longbench.report import decode_speed, health_table, speed_lines, write_results
from sparsecache.longbench.run_record import RunRecord, parse_run_record
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.scores import ScoringOptions, score_run
from sparsecache.longbench.tasks import load_tasks
from tests.longbench.scoring import score_table

Save = Callable[..., Path]


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)


def row(number: int, pred: str = "yes", **more: Any) -> dict[str, Any]:
    return {"pred": pred, "answers": ["yes"], "all_classes": ["yes"], "length": 100, "_id": str(number), **more}


def save(folder: Path, **datasets: list[dict[str, Any]]) -> None:
    for stem, rows in datasets.items():
        (folder / f"{stem}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    expected = {stem: {"expected_rows": len(rows)} for stem, rows in datasets.items()}
    (folder / "run.json").write_text(json.dumps({"datasets": expected}))


def written(result: RunScore, options: ScoringOptions = ScoringOptions()) -> list[Any]:
    return [read_json(path) for path in write_results(result, options)]


def test_the_columns_of_a_score_table_are_aligned(tmp_path: Path) -> None:
    save(tmp_path, qasper=[row(0), row(1, "no")], trec=[row(0)], lcc=[row(0)])
    lines = score_table(score_run(tmp_path)).split("\n")
    assert lines[0] == str(tmp_path)
    assert [line.split() for line in lines[1:6]] == [
        ["dataset", "score", "±", "n", "of"],
        ["-" * len("mean of datasets (3 of 21 datasets)"), "-" * 6, "-" * 4, "-", "--"],
        ["qasper", "50.00", "50.0", "2", "2"],
        ["trec", "100.00", "-", "1", "1"],
        ["lcc", "100.00", "-", "1", "1"],
    ]
    ends = {line.index(score) + len(score) for line in lines[3:6] for score in [line.split()[1]]}
    assert ends == {lines[1].index("score") + len("score")}
    assert lines[7].split() == "single_doc_qa (1 of 4 datasets) 50.00 50.0 2".split()
    assert "Avg, English (3 of 16 datasets)" in "\n".join(lines)
    assert "Avg, Chinese" not in "\n".join(lines)  # code alone is no Chinese
    assert not any("INCOMPLETE" in line or "Warning" in line for line in lines)


def test_notes_are_below_the_scores(tmp_path: Path) -> None:
    save(tmp_path, qasper=[row(0), row(1, "", error="OutOfMemoryError")], trec=[row(0, "")])
    (tmp_path / "lcc.jsonl").write_text("")
    text = score_table(score_run(tmp_path))
    assert "INCOMPLETE: qasper 1 of 2 rows, lcc 0 of 500 rows.\n" in text
    assert "Warning: qasper: 1 error rows count 0.0; run the prediction again to retry them.\n" in text
    assert "Warning: trec: 1 of 1 predictions are empty." in text
    assert "lcc" in text and " 0  500" in text


def test_a_warning_about_every_dataset_is_printed_once(tmp_path: Path) -> None:
    save(tmp_path, qasper=[row(0)], trec=[row(0)])
    (tmp_path / "run.json").unlink()
    text = score_table(score_run(tmp_path))
    assert text.count("Warning: every dataset: run.json") == text.count("Warning") == 1


def test_results_have_the_official_format(tmp_path: Path) -> None:
    save(tmp_path, qasper=[row(0), row(1, "no")], trec=[])
    result, _ = written(score_run(tmp_path))
    assert result == {"qasper": 50.0, "trec": None}
    save(tmp_path, qasper_e=[row(0), row(1, length=9000)])
    result, summary = written(score_run(tmp_path, e=True))
    assert result == {"qasper": {"0-4k": 100.0, "4-8k": None, "8k+": 100.0}}
    assert summary["longbench_e"] is True
    assert summary["datasets"]["qasper"]["buckets"] == {
        "0-4k": {"score": 100.0, "stderr": None, "n": 1},
        "4-8k": {"score": None, "stderr": None, "n": 0},
        "8k+": {"score": 100.0, "stderr": None, "n": 1},
    }
    names = sorted(path.name for path in tmp_path.glob("*.json"))
    assert names == ["result.json", "result_e.json", "run.json", "summary.json", "summary_e.json"]


def test_the_summary_has_n_for_every_number(tmp_path: Path) -> None:
    save(tmp_path, qasper=[row(0), row(1, "no"), row(2, ""), row(3, "", error="x")], hotpotqa=[row(0)])
    _, summary = written(score_run(tmp_path), ScoringOptions(edit_backend="fuzzywuzzy", official_recursion=True))
    assert summary["datasets"]["qasper"] == {
        "score": 25.0,
        "stderr": 25.0,
        "n": 4,
        "expected_n": 4,
        "complete": False,
        "metric": "token_f1",
        "empty": 1,
        "metric_errors": 0,
        "error_rows": 1,
        "beyond_official_recursion": 0,
        "warnings": [
            "1 of 4 predictions are empty",
            "1 error rows count 0.0; run the prediction again to retry them",
        ],
    }
    assert (summary["folder"], summary["longbench_e"], summary["complete"]) == (tmp_path.name, False, False)
    assert summary["backends"] == {
        "rouge_l": "rouge 1.0.1",
        "edit_similarity": "fuzzywuzzy",
        "official_recursion": True,
    }
    multi = {"score": 100.0, "stderr": None, "datasets": 1, "of_datasets": 4, "n": 1, "partial": True}
    assert summary["categories"]["multi_doc_qa"] == multi
    none = {"score": None, "stderr": None, "datasets": 0, "of_datasets": 2, "n": 0, "partial": True}
    assert summary["categories"]["code"] == none
    assert summary["averages"]["avg_en"] == {**multi, "score": 62.5, "datasets": 2, "of_datasets": 16, "n": 5}
    assert list(summary["averages"]) == ["avg_en", "avg_zh", "avg_all", "flat_mean"]
    assert summary["decode"] is None


def sparse(number: int, kept: float | None, **more: Any) -> dict[str, Any]:
    return row(number, **{"kept": kept, "sparse_steps": 10, "capped_steps": 10, "dense_layers": 2, **more})


def test_kept_is_a_column(tmp_path: Path) -> None:
    save(tmp_path, qasper=[sparse(0, 0.04), sparse(1, 0.06), sparse(2, None)], trec=[sparse(0, 0.005)], lcc=[row(0)])
    text = score_table(score_run(tmp_path))
    lines = [line.split() for line in text.split("\n")]
    assert lines[1] == ["dataset", "score", "±", "n", "of", "kept"]
    assert [line[0] + " " + line[-1] for line in lines[3:6]] == ["qasper 5.0%", "trec 0.50%", "lcc -"]
    ends = {len(line) for line in text.split("\n")[1:6]}
    assert len(ends) == 1
    (mean,) = (line for line in lines if line[:3] == ["mean", "of", "datasets"])
    assert mean[-1] == "2.8%"  # of the two datasets that report it
    assert [line[-1] for line in lines if line and line[0] in ("single_doc_qa", "code")] == ["5.0%", "-"]
    assert "over 40 sparse steps of 3 rows (1 more had no sparse step); dense layers: 2.\n" in text + "\n"


def test_kept_comes_before_the_buckets(tmp_path: Path) -> None:
    save(tmp_path, qasper_e=[sparse(0, 0.04), sparse(1, 0.06, length=9000)])
    lines = score_table(score_run(tmp_path, e=True)).split("\n")
    assert lines[1].split() == "dataset score ± n of kept 0-4k n 4-8k n 8k+ n".split()
    assert lines[3].split() == "qasper_e 100.00 0.0 2 2 5.0% 100.00 1 - 0 100.00 1".split()
    assert "5.0%" in lines[5] and lines[5].index("5.0%") == lines[3].index("5.0%")


def test_rows_without_sparse_steps_give_a_line_and_no_column(tmp_path: Path) -> None:
    save(tmp_path, qasper=[sparse(0, None, sparse_steps=0)])
    result = score_run(tmp_path)
    text = score_table(result)
    assert text.split("\n")[1].split()[-1] == "of"
    assert "over 0 sparse steps of 0 rows (1 more had no sparse step)" in text
    assert written(result)[1]["datasets"]["qasper"]["kept"] is None


def test_the_summary_has_kept_and_the_result_is_official(tmp_path: Path) -> None:
    offload = {"fetched_bytes": 7, "gpu_cache_hit": 0.5}
    save(tmp_path, qasper=[sparse(0, 0.04), sparse(1, None)], hotpotqa=[sparse(0, 0.08, **offload)], trec=[row(0)])
    result, summary = written(score_run(tmp_path))
    assert result == {"qasper": 100.0, "hotpotqa": 100.0, "trec": 100.0}
    qasper, hotpotqa, trec = (summary["datasets"][name] for name in ("qasper", "hotpotqa", "trec"))
    found = {"kept": 0.04, "kept_n": 1, "rows_without_sparse_step": 1, "sparse_steps": 20, "capped_steps": 20}
    assert {key: qasper[key] for key in found} == found
    assert qasper["dense_layers"] == [2] and "fetched_bytes" not in qasper
    assert {key: hotpotqa[key] for key in offload} == offload
    assert not {"kept", "kept_n", "sparse_steps", "dense_layers"} & trec.keys()
    assert summary["averages"]["flat_mean"]["kept"] == 0.06
    assert summary["categories"]["multi_doc_qa"]["kept"] == 0.08
    assert "kept" not in summary["categories"]["few_shot"]


def test_the_recorded_version_of_rouge_is_the_installed_one(tmp_path: Path) -> None:
    from importlib.metadata import version

    save(tmp_path, qasper=[row(0)])
    _, summary = written(score_run(tmp_path))
    assert summary["backends"]["rouge_l"] == f"rouge {version('rouge')}"


def test_rouge_score_is_shown_in_addition(tmp_path: Path) -> None:
    save(tmp_path, gov_report=[row(0, "a cat sat", answers=["a cat ran"])], vcsum=[row(0, "会议", answers=["会议"])])
    options = ScoringOptions(rouge_score=True)
    result = score_run(tmp_path, options=options)
    _, summary = written(result, options)
    assert summary["datasets"]["gov_report"]["rouge_score"] == {"rouge1": 66.67, "rouge2": 50.0, "rougeL": 66.67}
    assert summary["datasets"]["vcsum"]["rouge_score"]["rougeL"] == 100.0
    assert "rouge-score: gov_report: rouge1 66.67, rouge2 50.00, rougeL 66.67" in score_table(result)
    assert "rouge_score" not in written(score_run(tmp_path))[1]["datasets"]["gov_report"]


def test_the_note_of_the_model_and_its_speed_are_shown(tmp_path: Path) -> None:
    save(tmp_path, qasper=[row(0)])
    record = json.loads((tmp_path / "run.json").read_text())
    clocks = [
        {"prefill_s": 1.5, "prefill_tokens": 900, "decode_s": 2.0, "decode_tokens": 30, "peak_gpu_bytes": None},
        None,
        {"prefill_s": 0.5, "prefill_tokens": 100, "decode_s": 1.0, "decode_tokens": 60, "peak_gpu_bytes": 7},
    ]
    record |= {"model": {"note": "Random weights."}, "sessions": [{"clock": clock} for clock in clocks]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    result = score_run(tmp_path)
    assert written(result)[1]["decode"] == {
        "tokens": 90,
        "seconds": 3.0,
        "tokens_per_s": 30.0,
        "prefill_tokens_per_s": 500.0,
        "peak_gpu_bytes": 7,
    }
    lines = score_table(result).split("\n")
    assert lines[1] == "Note: Random weights."
    assert lines[-1].startswith("Speed: decode 30.0 tokens/s over 90 tokens, prefill 500.0 tokens/s")


def test_runs_without_decoding_have_no_speed() -> None:
    assert decode_speed(RunRecord()) is None
    idle = {"prefill_s": 1.0, "prefill_tokens": 9, "decode_s": 0.0, "decode_tokens": 0, "peak_gpu_bytes": None}
    assert decode_speed(parse_run_record({"sessions": [{"clock": idle}]})) is None


def test_a_result_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    save(tmp_path, qasper=[row(0)])
    (tmp_path / "result.json").mkdir()
    with pytest.raises(UsageError, match=r"result\.json cannot be written: Is a directory"):
        write_results(score_run(tmp_path), ScoringOptions())


def finished(pred: str = "Paris.", **more: Any) -> dict[str, Any]:
    return {"pred": pred, "truncated": False, "recut_tokens": 0, "finish_reason": "stop", **more}


ERROR = {"pred": "", "error": "OutOfMemoryError"}
GARBLED = "the " * 40


def health(name: str, rows: list[dict[str, Any]], expected: int | None = None) -> list[str]:
    return health_table([(load_tasks()[name], name, expected or len(rows), rows)]).split("\n")


def test_health_counts_signs_of_trouble() -> None:
    odd = [finished(truncated=True, recut_tokens=16), finished(" \n", finish_reason="length"), finished(GARBLED), ERROR]
    lines = health("qasper", [*odd, *[finished()] * 16], expected=30)
    assert lines[0].split("  ")[-1].strip() == "degenerate"
    assert lines[2].split() == ["qasper", "20/30", "1", "1", "0", "1", "1", "1"]
    assert lines[3:] == ["Warning: rows failed; rerun the command (without --overwrite) to retry them: qasper 1/20."]


def test_health_shows_kept_if_reported() -> None:
    few = {"sparse_steps": 10, "capped_steps": 10, "dense_layers": 1}
    tasks = load_tasks()
    sparse_rows = [finished(kept=0.01, **few), finished(kept=0.005, **few), finished(kept=None, **few), ERROR]
    datasets = [(tasks["qasper"], "qasper", 4, sparse_rows), (tasks["trec"], "trec", 1, [finished()])]
    lines = health_table(datasets).split("\n")
    assert [line.split()[-1] for line in (lines[0], *lines[2:4])] == ["kept", "0.75%", "-"]
    assert lines[-1].endswith("over 30 sparse steps of 2 rows (1 more had no sparse step); dense layers: 1.")


@pytest.mark.parametrize(
    ("name", "rows", "warning"),
    [
        ("qasper", [finished()] * 9 + [finished("")], None),
        ("qasper", [finished()] * 8 + [finished("")] * 2, "predictions are empty: qasper 2/10"),
        (
            "vcsum",
            [finished()] * 8 + [finished(GARBLED)] * 2,
            "mostly repetitions, symbols or digits: vcsum 2/10",
        ),
        ("qasper", [finished(finish_reason="length")] * 5 + [finished()] * 5, None),
        ("qasper", [finished(finish_reason="length")] * 6 + [finished()] * 4, "ended by length .*: qasper 6/10"),
        ("gov_report", [finished(finish_reason="length")] * 10, None),
        ("lcc", [finished(finish_reason="length")] * 10, None),
        ("qasper", [finished(truncated=True)] * 10, None),
        ("qasper", [finished(recut_tokens=16)] * 10, None),
        (
            "qasper",
            [finished(recut_tokens=17)] + [finished()] * 9,
            r"lost more than 16 tokens .*max_length.*qasper 1/10",
        ),
        ("qasper", [], None),
    ],
)
def test_health_warns_above_a_threshold(name: str, rows: list[dict[str, Any]], warning: str | None) -> None:
    lines = health(name, rows)[3:]
    assert len(lines) == (warning is not None)
    if warning:
        import re

        assert re.search(warning, lines[0])


def test_a_warning_names_all_its_datasets() -> None:
    tasks = load_tasks()
    text = health_table([(tasks[name], name, 1, [finished("")]) for name in ("qasper", "trec")])
    assert text.split("\n")[-1] == "Warning: predictions are empty: qasper 1/1, trec 1/1."


def test_a_missing_file_is_reported_as_incomplete(tmp_path: Path) -> None:
    save(tmp_path, qasper=[row(0)], trec=[row(0), row(1)])
    (tmp_path / "trec.jsonl").unlink()
    result = score_run(tmp_path)
    text = score_table(result)
    assert "INCOMPLETE: trec 0 of 2 rows.\n" in text
    assert "Warning: trec: its file is missing." in text
    numbers, summary = written(result)
    assert numbers == {"qasper": 100.0, "trec": None}
    assert summary["complete"] is False and summary["datasets"]["trec"]["expected_n"] == 2


def test_a_custom_dataset_is_complete_with_any_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"template": "{context}", "max_new_tokens": 8, "metric": "token_f1", "category": "code", "language": "en"}
    tables = {**read_tables("datasets.toml"), "mine": fields}
    monkeypatch.setattr(
        "sparsecache.longbench.tasks.read_tables", lambda name: tables if name == "datasets.toml" else read_tables(name)
    )
    save(tmp_path, mine=[row(0), row(1, "no")])
    for _ in range(2):
        result = score_run(tmp_path)
        text = score_table(result)
        assert "INCOMPLETE" not in text and "None" not in text
        numbers, summary = written(result)
        assert numbers == {"mine": 50.0} and summary["complete"] is True
        (tmp_path / "run.json").unlink(missing_ok=True)


def test_the_speed_line_without_prefill_time_and_with_memory() -> None:
    clock = {"prefill_s": 0.0, "prefill_tokens": 0, "decode_s": 2.0, "decode_tokens": 5, "peak_gpu_bytes": 3 * 2**29}
    run = parse_run_record({"sessions": [{"clock": clock}]})
    assert decode_speed(run)["prefill_tokens_per_s"] is None  # type: ignore[index]
    (line,) = speed_lines(run)
    assert line.startswith("Speed: decode 2.5 tokens/s over 5 tokens, prefill ")
    assert "1.5 GiB" in line
