"""Samples of a workload file or a run: shares of datasets, lengths, order, and files that are refused."""

import csv
import json

import pytest

from sparsecache.bench.workload import Workload, sample_lengths, sample_requests
from sparsecache.errors import UsageError


def test_a_sample_has_each_datasets_share_spread_over_its_lengths(tmp_path) -> None:
    file = tmp_path / "workload.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(("dataset", "prompt_tokens", "new_tokens", "max_new_tokens"))
        writer.writerows(("long", 1000 + at, 7, 9) for at in range(300))
        writer.writerows(("short", at, 0, 9) for at in range(1, 101))
        writer.writerow(("rare", 5, 1, 9))
    sample = sample_lengths(file, 40)
    lengths = [workload.tokens for workload in sample]
    assert lengths == sorted(lengths, reverse=True) and min(workload.new_tokens for workload in sample) == 1
    long, short = ([n for n in lengths if low <= n < high] for low, high in ((1000, 2000), (6, 1000)))
    assert (len(long), len(short), len(sample)) == (30, 10, 41)
    assert sum(long) / len(long) == pytest.approx(1149.5, abs=2) and min(long) < 1010 < 1290 < max(long)
    requests = sample_requests(file, 40, vocab_size=50)
    assert [(len(r.token_ids), r.max_new_tokens) for r in requests] == [(w.tokens, w.new_tokens) for w in sample]
    assert {token for request in requests for token in request.token_ids} == set(range(3, 50))


def test_what_may_have_long_answers_comes_first(tmp_path) -> None:
    rows = "long,900,1,2\nshort,30,3,512\nshort,40,4,512\nlong,800,5,2\n"
    (tmp_path / "w.csv").write_text(f"dataset,prompt_tokens,new_tokens,max_new_tokens\n{rows}")
    assert [workload.tokens for workload in sample_lengths(tmp_path / "w.csv", 4)] == [40, 30, 900, 800]


def test_a_file_saved_by_a_spreadsheet_is_read(tmp_path) -> None:
    (tmp_path / "w.csv").write_text("dataset,prompt_tokens,new_tokens\r\na,7,2\r\n", encoding="utf-8-sig")
    assert sample_lengths(tmp_path / "w.csv", 10) == [Workload(7, 2)]


def test_the_lengths_of_a_run_are_a_workload_without_its_error_rows(tmp_path) -> None:
    (tmp_path / "run.json").write_text("{}")
    for dataset, lengths in {"qasper": [(30, 4), (20, 5)], "trec": [(70, 2)]}.items():
        rows = [{"_id": f"{n}", "pred": "x", "answers": ["x"], "prompt_tokens": n, "new_tokens": k} for n, k in lengths]
        (tmp_path / f"{dataset}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with (tmp_path / "trec.jsonl").open("a") as file:
        file.write('{"_id": "e", "error": "out of memory", "answers": ["x"], "prompt_tokens": 9}\n')
    assert sample_lengths(tmp_path, 10) == [Workload(70, 2), Workload(30, 4), Workload(20, 5)]


@pytest.mark.parametrize(
    "lengths", ["", ', "prompt_tokens": "30", "new_tokens": 4', ', "prompt_tokens": 30, "new_tokens": null']
)
def test_a_prediction_without_its_lengths_is_refused(lengths, tmp_path) -> None:
    (tmp_path / "trec.jsonl").write_text(f'{{"pred": "x", "answers": ["x"]{lengths}}}\n')
    with pytest.raises(UsageError, match=r"is not a workload \(.*trec\.jsonl, row 1: prompt_tokens and new"):
        sample_lengths(tmp_path, 10)


def test_a_folder_without_predictions_is_refused(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trec.jsonl").write_text('{"_id": "e", "error": "out of memory", "answers": ["x"]}\n')
    for folder in (tmp_path, tmp_path / "run"):
        with pytest.raises(UsageError, match="has no finished predictions"):
            sample_lengths(folder, 10)


@pytest.mark.parametrize("rows", ["", "x,-4,0\n", "x,4,-1\n", f"x,{10**12},3\n", f"x,3,{10**12}\n"], ids=repr)
def test_lengths_out_of_range_are_refused(rows, tmp_path) -> None:
    (tmp_path / "w.csv").write_text(f"dataset,prompt_tokens,new_tokens\n{rows}")
    with pytest.raises(UsageError, match="needs rows with prompt_tokens of 1 or more and new_tokens of 0 or more"):
        sample_lengths(tmp_path / "w.csv", 10)


@pytest.mark.parametrize(
    "text",
    [None, "", "a,b\n1,2\n", "dataset,prompt_tokens,new_tokens\nx,many,3\n", f"dataset\n{'x' * 200_000}\n", "\0"],
    ids=["missing", "empty", "other columns", "no number", "a field too long", "binary"],
)
def test_a_file_without_the_columns_is_refused(text, tmp_path) -> None:
    if text is not None:
        (tmp_path / "w.csv").write_text(text)
    with pytest.raises(UsageError, match=r"w\.csv (is not a workload|needs rows)") as raised:
        sample_lengths(tmp_path / "w.csv", 10)
    assert "prompt_tokens" in str(raised.value) and "new_tokens" in str(raised.value)
