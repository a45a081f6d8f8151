"""RULER's tasks against the published constants, its string match, and its means in tables, gates and plots."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecache.errors import UsageError
from sparsecache.longbench.compare import compare
from sparsecache.longbench.compare_tables import compare_document
from sparsecache.longbench.gate import gate
from sparsecache.longbench.gate_checks import Limits
from sparsecache.longbench.plots import get_plot
from sparsecache.longbench.report import summary_json, write_results
from sparsecache.longbench.score_tables import score_document
from sparsecache.longbench.scores import ScoringOptions, load_metric, score_run
from sparsecache.longbench.tasks import find_ruler_tasks, load_ruler_tasks, make_own_tasks, ruler_names, select_tasks
from tests.longbench.scoring import score_table

# SHA-256 of template and answer prefix with <C> for the context and <Q> for the question, limit of new tokens, metric
NUMBER, UUID = ("c7d0e791025a1af6", 128, "all"), ("ed2d4c0c808308fd", 128, "all")
NUMBERS, QA = ("ef6f989f6993e450", 128, "all"), ("2b6053651a40b187", 32, "part")
PUBLISHED = {
    "niah_single_1": NUMBER, "niah_single_2": NUMBER, "niah_single_3": UUID,
    "niah_multikey_1": NUMBER, "niah_multikey_2": NUMBER, "niah_multikey_3": UUID,
    "niah_multivalue": NUMBERS, "niah_multiquery": NUMBERS,
    "vt": ("338b857759138ec6", 30, "all"), "cwe": ("36a78ae5e69d0034", 120, "all"),
    "fwe": ("c2eefcf3f1df3cb4", 50, "all"), "qa_1": QA, "qa_2": QA,
}  # fmt: skip


def test_templates_limits_and_metrics_are_the_published_ones() -> None:
    found = {}
    for task in load_ruler_tasks([4096]).values():
        text = (task.template + task.answer_prefix).format(examples="", context="<C>", input="<Q>")
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        found[task.base_name] = digest, task.max_new_tokens, task.metric.removeprefix("string_match_")
        assert (task.group, task.rows, task.chat, task.length) == ("ruler", 500, True, 4096)
    assert found == PUBLISHED


def test_names_select_tasks_in_every_length() -> None:
    assert [task.name for task in select_tasks("vt,qasper,cwe", ruler_lengths=[4096, 8192])] == [
        "qasper", "vt_4096", "cwe_4096", "vt_8192", "cwe_8192",
    ]  # fmt: skip
    assert [task.base_name for task in select_tasks("ruler", ruler_lengths=[4096])] == ruler_names()
    assert not {task.group for task in select_tasks("all,en,zh")} & {"ruler"}
    with pytest.raises(UsageError, match="'vt' is not part of LongBench-E"):
        select_tasks("vt", e=True)
    with pytest.raises(UsageError, match="ruler for niah_single_1, .*qa_2"):
        select_tasks("niah")
    assert list(find_ruler_tasks(["vt_8192", "qasper", "vt_x", "vt_0", "vt_04", "_4", "qa_1_4096", "vt"])) == [
        "qa_1_4096", "vt_8192",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["ruler", "vt", "vt_4096", "qa_1_131072"])
def test_own_tasks_take_no_name_of_ruler(name: str) -> None:
    with pytest.raises(UsageError, match="the name is taken"):
        make_own_tasks({name: {"template": "{context}", "max_new_tokens": 8, "metric": "token_f1"}}, "f")


TEXTS = st.text(alphabet="aAbB ßẞİ\x00\t\n\x1f.", max_size=12)


@given(TEXTS, st.lists(st.text(alphabet="aAbBßẞİ", max_size=3), min_size=1, max_size=4))
def test_string_match_is_the_published_one(prediction: str, answers: list[str]) -> None:
    cleaned = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()
    found = [1.0 if answer.lower() in cleaned.lower() else 0.0 for answer in answers]
    part, every = (load_metric(f"string_match_{kind}") for kind in ("part", "all"))
    assert [part(prediction, answer, None) for answer in answers] == found  # type: ignore[arg-type]
    assert [every(prediction, answer, None) for answer in answers] == found  # type: ignore[arg-type]


def rows(*predictions: str, answers: list[str]) -> list[dict[str, Any]]:
    return [
        {"pred": text, "answers": answers, "all_classes": None, "length": 4096, "_id": str(at), "kept": 0.1,
         "sparse_steps": 2, "finish_reason": "length"}
        for at, text in enumerate(predictions)
    ]  # fmt: skip


DATASETS = {
    "vt_4096": rows("ab CD", "none", answers=["AB", "cd"]),
    "qa_1_4096": rows("ab", "none", answers=["AB", "cd"]),
    "vt_8192": rows("AB", "none", answers=["AB", "cd"]),
}


def test_all_answers_count_or_any(make_run: Callable[..., Path]) -> None:
    run = score_run(make_run("a", DATASETS))
    assert {dataset.task.name: [row.score for row in dataset.rows] for dataset in run.datasets} == {
        "vt_4096": [1, 0], "qa_1_4096": [1, 0], "vt_8192": [0.5, 0],
    }  # fmt: skip


def test_lengths_have_means_and_a_table_of_their_own(make_run: Callable[..., Path]) -> None:
    run = score_run(make_run("a", {"qasper": rows("AB", answers=["ab"]), **DATASETS}))
    assert run.averages["flat_mean"].score == 100 and run.averages["flat_mean"].datasets == 1
    mean = run.averages["ruler"]
    assert (round(mean.score or 0, 2), mean.datasets, mean.of_datasets, mean.n) == (41.67, 3, 26, 6)
    means = {name: (part.score, part.datasets, part.of_datasets) for name, part in run.categories.items()}
    assert means["ruler_4096"] == (50, 2, 13) and means["ruler_8192"] == (25, 1, 13)
    table = score_document(run).tables[1]
    assert [list(table.header), *([cell.text for cell in row] for row in table.data_rows)] == [
        ["task", "4096", "8192"], ["vt", "50.00", "25.00"], ["qa_1", "50.00", "-"], ["mean", "50.00", "25.00"],
    ]  # fmt: skip
    assert "RULER (3 of 26 datasets)" in score_table(run)
    averages = summary_json(run, ScoringOptions())["averages"]
    assert averages["ruler"]["datasets"] == 3 and [path.name for path in write_results(run, ScoringOptions())]
    one = score_run(make_run("b", {"vt_4096": DATASETS["vt_4096"]}))
    assert len(score_document(one).tables) == 1 and one.headline.score == 50
    assert "ruler_4096" not in one.categories and "RULER (1 of 13 datasets)" in score_table(one)


def test_ruler_is_compared_gated_and_plotted(
    make_run: Callable[..., Path], score_to_baseline: Callable[..., Any]
) -> None:
    worse = {**DATASETS, "vt_8192": rows("none", "none", answers=["AB", "cd"])}
    folders = [make_run("a", DATASETS), make_run("b", worse)]
    runs = [score_run(folder) for folder in folders]
    comparison = compare(runs, resamples=50)
    differences = {
        group.name: round(group.entries[1].difference.mean, 2)
        for group in comparison.groups
        if group.entries[1].difference
    }
    assert differences == {
        "vt_4096": 0, "qa_1_4096": 0, "vt_8192": -25, "ruler_4096": 0, "ruler_8192": -25, "ruler": -8.33,
    }  # fmt: skip
    document = compare_document(comparison)
    assert document.title == "m on RULER: b against a"
    assert [row[0].text for row in document.details[0].data_rows][-1] == "RULER (3 of 26 datasets)"
    baseline, run = (score_to_baseline(folder) for folder in folders)
    (check,) = gate(run, baseline, Limits(max_drop=5)).checks
    assert not check.passed and check.text.startswith("mean of 3 datasets of RULER: 33.33, baseline 41.67")
    pytest.importorskip("matplotlib")
    bars = get_plot("bars")(runs).svg().decode()
    assert "RULER" in bars and "3 RULER tasks" in bars
    assert get_plot("frontier")(runs).svg()
