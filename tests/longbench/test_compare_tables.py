"""Tables of comparisons: a line per run, details on request, titles and the flat form."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsecache.longbench.compare import compare
from sparsecache.longbench.compare_tables import compare_document
from sparsecache.longbench.run_record import ModelRecord
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.scores import score_run
from sparsecache.longbench.subjects import subject
from sparsecache.longbench.tables import render

MakeRun = Callable[..., Path]
Row = Callable[..., dict[str, Any]]

CACHE = {"layers": 10, "full_token_nbytes": 4096, "token_nbytes": 1024.0, "host_token_nbytes": 512.0}


def test_the_first_table_has_one_line_per_run(make_run: MakeRun, row: Row) -> None:
    full = make_run("a", {"qasper": [row(at) for at in range(40)]}, session={"cache": {**CACHE, "token_nbytes": 4096}})
    rows = [row(at, "yes" if at % 4 else "no", kept=0.1, dense_layers=2) for at in range(40)]
    sparse = make_run("b", {"qasper": rows}, {"method": "h2o"}, {"cache": CACHE})
    document = compare_document(compare([score_run(full), score_run(sparse), score_run(full)]))
    assert document.title == "m on LongBench: b, a (3) against a (1)"
    (table,) = document.tables
    assert table.header == [
        "run", "score", "difference", "95% interval", "kept", "whole model", "cache KiB/token", "on host", "tokens/s"
    ]  # fmt: skip
    found = [[cell.text for cell in line] for line in table.rows]
    assert found[0] == ["a (1)", "100.00", "-", "-", "-", "100.0%", "4.5", "0.5", "50.0"]
    assert found[1][:3] + found[1][4:] == [
        "b",
        "75.00",
        "-25.0",
        "10.0%",
        "28.0%",
        "1.5",
        "0.5",
        "50.0",
    ]  # (2 + 8 x 0.1) / 10
    assert found[2][2:4] == ["0.00", "0.00 to 0.00"]
    text = render(document, "terminal")
    assert (
        text.count("\nb ") == 1
        and "qasper" not in text
        and "score: mean of 1 dataset, 40 rows; the highest is marked." in text
    )
    facts = json.loads(render(document, "json"))["rows"][1]
    assert (facts["cache_bytes_per_token"], facts["full_cache_bytes_per_token"]) == (1536.0, 4096)
    assert facts["model_share"] == pytest.approx(0.28)


def test_the_first_table_names_the_dtypes_if_they_differ(make_run: MakeRun, row: Row) -> None:
    runs = [
        score_run(make_run(name, {"qasper": [row(0), row(1)]}, {"dtype": dtype}))
        for name, dtype in (("a", "fp8"), ("b", "bfloat16"), ("c", "fp8"))
    ]
    (table,) = compare_document(compare(runs)).tables
    assert [line[table.header.index("dtype")].text for line in table.rows] == ["fp8", "bfloat16", "fp8"]
    (table,) = compare_document(compare(runs[::2])).tables
    assert "dtype" not in table.header


def test_each_benchmark_has_a_table_of_its_own(make_run: MakeRun, row: Row) -> None:
    v2 = [row(at, "The correct answer is (A)", answers=["A"], length="short", difficulty="easy") for at in range(2)]
    runs = [score_run(make_run(name, {"qasper": [row(0)], "longbench_v2": v2})) for name in "ab"]
    document = compare_document(compare(runs))
    assert [table.title for table in document.tables] == [
        "LongBench: mean of 1 dataset, 1 row", "LongBench v2: mean of 1 dataset, 2 rows"]  # fmt: skip
    assert document.title == "m on LongBench and LongBench v2: b against a"


def test_titles_name_the_data(make_run: MakeRun, row: Row) -> None:
    def title(name: str, data: dict[str, Any] | None) -> str:
        return subject([score_run(make_run(name, {"qasper": [row(0)]}, session={"data": data}))])

    assert title("a", {"source": "sample", "rows": 2}) == "m on synthetic rows"
    assert title("b", {"source": "folder", "path": "/home/me/my rows"}) == "m on LongBench rows of my rows"
    assert title("c", {"source": "hub", "path": "/cache/data.zip"}) == title("d", None) == "m on LongBench"


def test_in_detail_two_runs_give_one_table_and_more_give_one_each(scored: Callable[..., RunScore]) -> None:
    runs = [scored(name, qasper=text * 10) for name, text in (("a", "yynn"), ("b", "yyny"), ("c", "ynnn"))]
    two, three = (compare_document(compare(runs[:count])).with_details() for count in (2, 3))
    assert two.tables[1].header == [
        "dataset", "n", "a", "b", "difference", "95% interval", "wins", "losses", "changed", "kept"]  # fmt: skip
    assert [table.title for table in two.tables[1:]] == ["", "speed and memory of each run, over all of its rows"]
    assert [table.title for table in three.tables][2:4] == ["b against a", "c against a"]
    line = next(line for line in render(two, "terminal").split("\n") if line.startswith("qasper"))
    assert line.split()[:5] == ["qasper", "40", "50.00", "75.00*", "+25.0"]
    assert line.split()[8:] == ["10", "0", "10", "-"]
    text = render(three, "terminal")
    assert "peak GPU GiB" in text and "H200" in text and "10,000 resamples, seed 0" in text
    assert text.count("\nqasper") == 3


def test_the_table_of_costs_names_methods_without_the_hash_of_their_file(make_run: MakeRun, row: Row) -> None:
    methods = {"a": "vanilla", "b": "mine@0123456789abcdef"}
    runs = [make_run(name, {"qasper": [row(0)]}, {"method": method}) for name, method in methods.items()]
    document = compare_document(compare([score_run(run) for run in runs]))
    assert [line[1].text for line in document.details[-1].rows] == ["vanilla", "mine"]
    assert methods["b"] in render(document, "json")


def test_decimals_of_differences_depend_on_the_interval(make_run: MakeRun, row: Row) -> None:
    rows = [row(at) for at in range(200)]
    worse = [row(0, "no"), *rows[1:]]
    close = compare_document(
        compare([score_run(make_run("a", {"qasper": rows})), score_run(make_run("b", {"qasper": worse}))])
    )
    assert [cell.text for cell in close.details[0].rows[0]][4:6] == ["-0.5", "-1.5 to 0.0"]
    calm = [row(at, "yes " * 9 + "no" * (at == 0)) for at in range(200)]
    still = [row(at, "yes " * 9) for at in range(200)]
    narrow = compare_document(
        compare([score_run(make_run("c", {"qasper": still})), score_run(make_run("d", {"qasper": calm}))])
    )
    text = [cell.text for cell in narrow.details[0].rows[0]]
    assert text[4:6] == ["-0.01", "-0.03 to 0.00"]


def test_a_run_whose_rows_all_failed_has_no_difference(make_run: MakeRun, row: Row) -> None:
    failed, partly = ([row(at, "", error="x") for at in range(count)] for count in (20, 19))
    answered = [row(at) for at in range(20)]
    rows = {"a": answered, "b": failed, "c": [*partly, answered[-1]]}
    document = compare_document(compare([score_run(make_run(name, {"qasper": each})) for name, each in rows.items()]))
    assert [[cell.text for cell in line[1:4]] for line in document.tables[0].rows[1:]] == [
        ["0.00", "failed", "-"], ["5.00", "-95.0", "-100.0 to -85.0"]]  # fmt: skip
    assert [cell.text for cell in document.details[1].rows[0]][1:3] == ["failed", "-"]


def test_the_flat_table_holds_unrounded_numbers(scored: Callable[..., RunScore]) -> None:
    found = compare([scored("a", qasper="yyn" * 7, trec="yn"), scored("b", qasper="yhn" * 7, trec="yy")])
    document = compare_document(found)
    rows = json.loads(render(document, "json"))["rows"]
    assert len(rows) == 2 * len(found.groups)
    for at, (line, run) in enumerate((line, run) for line in found.groups for run in range(2)):
        entry, said = line.entries[run], rows[at]
        assert (said["run"], said["kind"], said["name"], said["n"]) == ("ab"[run], line.kind, line.name, line.n)
        assert (said["score"], said["stderr"], said["best"]) == (entry.score, entry.stderr, entry.best)
        if entry.difference is None:
            assert {said[key] for key in ("difference", "low", "high", "wins", "changed")} == {None}
        else:
            assert (said["difference"], [said["low"], said["high"]]) == (
                entry.difference.mean, list(entry.difference.interval or (None, None)))  # fmt: skip
            assert said["wins"] + said["losses"] + said["ties"] == line.n
    read = list(csv.DictReader(io.StringIO(render(document, "csv"))))
    assert [float(line["score"]) for line in read] == [line["score"] for line in rows]
    assert [line["low"] for line in read if line["run"] == "a"] == [""] * len(found.groups)


def test_the_note_of_a_checkpoint_is_above_the_tables(scored: Callable[..., RunScore]) -> None:
    run = scored("a", qasper="yn")
    run = replace(run, run=replace(run.run, model=ModelRecord("Random weights.")))
    assert compare_document(compare([run, scored("b", qasper="yn")])).preamble == ["Note on a: Random weights."]
