"""Tasks of one's own: their file, their rows, and their own mean in tables, comparisons, gates and plots."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsecache.errors import UsageError
from sparsecache.longbench.compare import compare
from sparsecache.longbench.compare_tables import compare_document
from sparsecache.longbench.data import FileSource, FolderSource, load_rows, open_source
from sparsecache.longbench.gate import gate
from sparsecache.longbench.gate_checks import Limits
from sparsecache.longbench.plots import get_plot
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.scores import score_run
from sparsecache.longbench.tables import render
from sparsecache.longbench.tasks import Task, load_own_tasks, load_tasks, own_table, select_tasks
from sparsecache.synthetic.source import SampleSource
from tests.longbench.scoring import score_table

TABLE = 'template = "{context}\\n{input}"\nmax_new_tokens = 8\nmetric = "token_f1"\n'
OWN = {name: {"template": "{context}", "max_new_tokens": 8, "metric": "token_f1"} for name in ("mine", "yours")}


@pytest.fixture
def write_tasks(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes a file of tasks."""

    def write(text: str) -> Path:
        path = tmp_path / "my_tasks.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def load(path: Path, task: Task) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = load_rows(FileSource(path), task).dataset.to_list()
    return rows


@pytest.fixture
def mine(write_tasks: Callable[[str], Path]) -> Task:
    return load_own_tasks(write_tasks(f"[mine]\n{TABLE}"))["mine"]


def test_template_cap_and_metric_suffice(mine: Task) -> None:
    assert (mine.category, mine.language, mine.group, mine.chat) == ("own", "en", "own", True)
    assert mine.published_rows(False) is None


def test_the_group_own_holds_the_tasks_of_the_file_only(write_tasks: Callable[[str], Path]) -> None:
    own = load_own_tasks(write_tasks(f'[b]\n{TABLE}[a]\n{TABLE}category = "code"\n'))
    assert [task.name for task in select_tasks("own", own=own)] == ["b", "a"]
    assert [task.name for task in select_tasks("a,qasper", own=own)] == ["qasper", "a"]
    assert select_tasks("all", own=own) == select_tasks("all")
    assert [task.name for task in select_tasks("code", own=own)] == ["lcc", "repobench-p"]
    with pytest.raises(UsageError, match="no dataset 'own'"):
        select_tasks("own")
    with pytest.raises(UsageError, match="not part of LongBench-E"):
        select_tasks("own", e=True, own=own)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[mine", "is not valid TOML"),
        ("mine = 3", "mine is not a table"),
        (f"[qasper]\n{TABLE}", r"\[qasper\]: the name is taken"),
        (f"[trec_e]\n{TABLE}", r"\[trec_e\]: the name is taken"),
        (f"[longbench_v2]\n{TABLE}", r"\[longbench_v2\]: the name is taken"),
        (f"[all]\n{TABLE}", r"\[all\]: the name is taken"),
        (f"[own]\n{TABLE}", r"\[own\]: the name is taken"),
        (f'["../x"]\n{TABLE}', "the name must be 1 to 100 letters"),
        (f'[""]\n{TABLE}', "the name must be 1 to 100 letters"),
        (f'["a,b"]\n{TABLE}', "the name must be 1 to 100 letters"),
        (f"[mine]\n{TABLE}rows = 3", "rows describes published datasets only"),
        (f"[mine]\n{TABLE}cap = 3", "has unknown fields cap"),
        (f'[mine]\n{TABLE}source = "x"', "has unknown fields source"),
        ('[mine]\ntemplate = "{context}"', "has no max_new_tokens, metric"),
        (f"[mine]\n{TABLE}".replace("{input}", "{question}"), "the template uses question"),
        (
            f"[mine]\n{TABLE}".replace("{input}", "{input:>9999999999}"),
            "the template formats input; a field is its name",
        ),
        (f"[mine]\n{TABLE}".replace("{input}", "{input!r}"), "the template formats input"),
        ("[mine]\ntemplate = 'Hi'\nmax_new_tokens = 8\nmetric = 'count'", "the template uses no field of a row"),
        (f"[mine]\n{TABLE}answer_template = 'So?'\nanswer_max_new_tokens = 9", "must use {reasoning}"),
        (f"[mine]\n{TABLE}".replace("{input}", "{"), "not a valid str.format template"),
        (f"[mine]\n{TABLE}".replace("8", "0"), "max_new_tokens is 0"),
        (f"[mine]\n{TABLE}".replace("8", "true"), "max_new_tokens is True"),
        (f'[mine]\n{TABLE}chat = "no"', "chat is 'no'; it must be true or false"),
        ("[mine]\ntemplate = 3\nmax_new_tokens = 8\nmetric = 'count'", "template is 3; it must be a text"),
    ],
)
def test_a_wrong_file_of_tasks_is_refused_by_name(text: str, message: str, write_tasks: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=message) as failure:
        load_own_tasks(write_tasks(text))
    assert "my_tasks.toml" in str(failure.value)


def test_a_missing_file_of_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere.toml"):
        load_own_tasks(tmp_path / "nowhere.toml")


def test_rows_need_input_context_and_answers_only(tmp_path: Path, mine: Task) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"input": "Who?", "context": "Ada  was\nhere", "answers": ["Ada"]},
        {"input": "", "context": "", "answers": ["x"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = load(path, mine)
    assert (first["length"], first["dataset"], first["language"], first["all_classes"]) == (3, "mine", "en", None)
    assert second["length"] == 0 and first["_id"] != second["_id"]
    assert load(path, mine) == [first, second]
    path.write_text(json.dumps(list(reversed(rows))))
    assert load(path, mine) == [second, first]  # an _id depends on the row alone
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.jsonl").write_text(json.dumps(rows[0]))
    assert load_rows(FolderSource(folder), mine).dataset.to_list() == [first]


def test_repeated_rows_get_ids_of_their_own(tmp_path: Path, mine: Task) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(3 * (json.dumps({"input": "", "context": "c", "answers": ["a"]}) + "\n"))
    ids = [row["_id"] for row in load(path, mine)]
    assert len(set(ids)) == 3 and ids[1:] == [f"{ids[0]}-2", f"{ids[0]}-3"]


def test_given_fields_are_kept_and_chinese_is_counted_in_characters(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    given = {"input": "", "context": "一二三", "answers": ["a"], "_id": "x", "all_classes": ["a", "b"]}
    path.write_text(json.dumps(given) + "\n")
    (row,) = load(path, Task(name="mine", language="zh", **OWN["mine"]))
    assert {**row, **given} == row and row["length"] == 3
    assert load(path, load_tasks()["qasper"])[0]["dataset"] == "qasper"  # a single file serves any dataset


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "", "context": "c"}, "line 1: the row lacks answers"),
        ({"input": "", "context": 3, "answers": ["a"]}, "line 1: context is 3, not of type str"),
        ({"input": "", "context": "c", "answers": "a"}, "answers is not a list"),
        ({"input": "", "context": "c", "answers": []}, "answers is not a list of at least one"),
        ({"input": "", "context": "c", "answers": ["a"], "length": "long"}, 'length is "long", not of type int'),
        ({"input": "", "context": "c", "answers": ["a"], "dataset": "other"}, "belongs to dataset 'other', not 'mine'"),
    ],
)
def test_wrong_rows_are_refused(row: dict[str, Any], message: str, tmp_path: Path, mine: Task) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UsageError, match=message):
        load(path, mine)


def test_classification_needs_the_names_of_the_classes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"input": "", "context": "c", "answers": ["a"]}))
    with pytest.raises(UsageError, match="all_classes is empty"):
        load(path, Task(name="mine", **{**OWN["mine"], "metric": "classification"}))


def test_a_single_file_is_a_source_and_other_files_are_not(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.json", "rows.csv"):
        (tmp_path / name).write_text("[1]")
    for name in ("rows.jsonl", "rows.json"):
        source = open_source(str(tmp_path / name), sample=SampleSource())
        assert source.describe() == {"source": "file", "path": str(tmp_path / name)}
        with pytest.raises(UsageError, match="row 1: the row is not a JSON object"):
            load_rows(source, load_tasks()["qasper"])
    with pytest.raises(UsageError, match="one .jsonl"):
        open_source(str(tmp_path / "rows.csv"), sample=SampleSource())


@pytest.fixture
def scored(make_run: Callable[..., Path], row: Callable[..., dict[str, Any]]) -> Callable[..., RunScore]:
    """Return a function that scores a run of qasper and two own tasks from letters (y: right, n: wrong)."""

    def make(name: str, kept: float | None = None, **letters: str) -> RunScore:
        more = {} if kept is None else {"kept": kept, "sparse_steps": 1}
        rows = {
            stem: [row(at, "yes" if letter == "y" else "no", **more) for at, letter in enumerate(text)]
            for stem, text in letters.items()
        }
        folder = make_run(name, rows)
        record = json.loads((folder / "run.json").read_text())
        record["tasks"] = OWN
        record["identity"]["method"] = name
        (folder / "run.json").write_text(json.dumps(record))
        return score_run(folder)

    return make


def test_own_tasks_have_their_own_mean_in_every_table(scored: Callable[..., RunScore]) -> None:
    run = scored("a", qasper="yy", mine="yn", yours="nnnn")
    means = {name: (mean.score, mean.datasets, mean.n) for name, mean in run.averages.items() if mean.datasets}
    assert means == {
        "avg_en": (100, 1, 2), "avg_all": (100, 1, 2), "flat_mean": (100, 1, 2), "own_mean": (25, 2, 6),
    }  # fmt: skip
    lines = [line.split() for line in score_table(run).split("\n")]
    assert [line[4] for line in lines if line[:4] == ["mean", "of", "own", "tasks"]] == ["25.00"]
    comparison = compare([run, scored("b", qasper="yn", mine="yy", yours="ynnn")], resamples=50)
    groups = {group.name: group for group in comparison.groups}
    differences = {name: groups[name].entries[1].difference for name in ("flat_mean", "own_mean")}
    assert [part and part.mean for part in differences.values()] == [-50.0, 37.5]
    document = compare_document(comparison)
    assert "own tasks: mean of 2 datasets, 6 rows" in render(document, "terminal")
    assert "mean of own tasks" in render(document.with_details(), "terminal")


def test_the_headline_is_of_longbench_first(scored: Callable[..., RunScore]) -> None:
    assert scored("a", qasper="y", mine="n").headline.score == 100
    assert scored("b", mine="n", yours="y").headline.score == 50


def test_the_gate_checks_own_tasks_apart(
    scored: Callable[..., RunScore], score_to_baseline: Callable[..., Any]
) -> None:
    folders = [scored("a", qasper="yyyy", mine="yyyy"), scored("b", qasper="yyyy", mine="yynn")]
    baseline, run = (score_to_baseline(result.folder) for result in folders)
    verdict = gate(run, baseline, Limits(max_drop=30))
    assert [check.passed for check in verdict.checks] == [True, False]
    assert verdict.checks[1].text.startswith("mean of 1 own tasks: 50.00, baseline 100.00")


def test_plots_show_the_mean_of_own_tasks(scored: Callable[..., RunScore]) -> None:
    pytest.importorskip("matplotlib")
    runs = [
        scored("vanilla", qasper="yy", mine="yy", yours="yy"),
        scored("snapkv", 0.2, qasper="yn", mine="yn", yours="nn"),
    ]
    bars = get_plot("bars")(runs).svg().decode()
    assert "2 own tasks" in bars and "own tasks" in bars
    frontier = get_plot("frontier")(runs)
    assert "LongBench: 1 datasets (2 rows); own tasks: 2 datasets (4 rows)" in frontier.caption
    only_own = [scored("v", mine="yy"), scored("s", 0.2, mine="yn")]
    assert "Mean score of 1 datasets (2 rows)" in get_plot("frontier")(only_own).caption


def test_recorded_tasks_are_read_back_and_a_file_takes_precedence(scored: Callable[..., RunScore], mine: Task) -> None:
    run = scored("a", mine="y")
    again = {"mine": Task(name="mine", **{**own_table(mine), "metric": "count"})}
    assert run.datasets[0].task.metric == "token_f1"
    assert score_run(run.folder, own=again).datasets[0].task.metric == "count"
    record = json.loads((run.folder / "run.json").read_text())
    record["tasks"] = {"mine": {"template": "{x}"}}
    (run.folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"run\.json \[mine\] has no max_new_tokens, metric"):
        score_run(run.folder)
    del record["tasks"]
    (run.folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="describe them in a file for --tasks"):
        score_run(run.folder)
