"""The dataset table against the published protocol.

In one file because the expected table of 21 datasets fills most of it.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsecache.configs import read_tables
from sparsecache.errors import UsageError
from sparsecache.longbench.scores import load_metric
from sparsecache.longbench.tasks import Task, load_ruler_tasks, load_tasks, select_tasks

# name: (SHA-256 of the published template, cap, category, language, metric, rows, rows of LongBench-E)
PUBLISHED = {
    "narrativeqa": (
        "aada7ed24b06abace5b0045ac3bcfe06fc831a6cf434f0ecfd99fb7b3d299e1c",
        128,
        "single_doc_qa",
        "en",
        "token_f1",
        200,
        None,
    ),
    "qasper": (
        "0fbdd123fe7f83d6d6a9c583ca28cb29d68e523bf8fec01a0cf2dcd11037775d",
        128,
        "single_doc_qa",
        "en",
        "token_f1",
        200,
        224,
    ),
    "multifieldqa_en": (
        "20b4666a2de8a1f701bdb6c4e015fa9f8758d64b361d841f7766df6c9ceba770",
        64,
        "single_doc_qa",
        "en",
        "token_f1",
        150,
        150,
    ),
    "multifieldqa_zh": (
        "344b3a4e557cd5470c661b3d6b374339717e1257a6c01f628d22322d4a554b94",
        64,
        "single_doc_qa",
        "zh",
        "jieba_f1",
        200,
        None,
    ),
    "hotpotqa": (
        "9ec4ae308865bd0c62af20b3dc7b12b31f2b447f55684bd88c1aa40f2f636deb",
        32,
        "multi_doc_qa",
        "en",
        "token_f1",
        200,
        300,
    ),
    "2wikimqa": (
        "9ec4ae308865bd0c62af20b3dc7b12b31f2b447f55684bd88c1aa40f2f636deb",
        32,
        "multi_doc_qa",
        "en",
        "token_f1",
        200,
        300,
    ),
    "musique": (
        "9ec4ae308865bd0c62af20b3dc7b12b31f2b447f55684bd88c1aa40f2f636deb",
        32,
        "multi_doc_qa",
        "en",
        "token_f1",
        200,
        None,
    ),
    "dureader": (
        "ae53329f51b17908e08b8c6bf366987282b8b38c0ee35275ebd7b79e9b30eff2",
        128,
        "multi_doc_qa",
        "zh",
        "jieba_rouge_l",
        200,
        None,
    ),
    "gov_report": (
        "91c25d585b189ced91c9280efcb4ecb5dcff9548cd4e3bfae66c68025b569e95",
        512,
        "summarization",
        "en",
        "rouge_l",
        200,
        300,
    ),
    "qmsum": (
        "dca23b678fe0183bbd9555b57947022aed1b85739da5ad7e1b4708dd0c71c409",
        512,
        "summarization",
        "en",
        "rouge_l",
        200,
        None,
    ),
    "multi_news": (
        "2af3f28c40b902e6535d4910510d51653613c49de9b2fc287c5958395061101d",
        512,
        "summarization",
        "en",
        "rouge_l",
        200,
        294,
    ),
    "vcsum": (
        "3e5d8241bc9b512eb4929c1ba80882a44f50b446bc2b1d9d79eff030dd10dc27",
        512,
        "summarization",
        "zh",
        "jieba_rouge_l",
        200,
        None,
    ),
    "trec": (
        "0eff8bebdba99d91e9d7d91b6ab39455ac74648bea92c9255c9f68c62175b2db",
        64,
        "few_shot",
        "en",
        "classification",
        200,
        300,
    ),
    "triviaqa": (
        "00a802e6377e72fca39b169cf6c28893bedf23ba7286b03ecd15867c3e27a7c4",
        32,
        "few_shot",
        "en",
        "token_f1",
        200,
        300,
    ),
    "samsum": (
        "a68d884234907eefcaa0eacf7b2997f60fa46603988dceae6a44f9b49f045b3f",
        128,
        "few_shot",
        "en",
        "rouge_l",
        200,
        300,
    ),
    "lsht": (
        "f3edabdf7fae53d6cadfa7a10f3574d114302161c46dacecd5d30763204bbbf3",
        64,
        "few_shot",
        "zh",
        "classification",
        200,
        None,
    ),
    "passage_count": (
        "986550b6c61009c629a4535766d94b7b51e2b2b9e1ed169e4ecb54417466e964",
        32,
        "synthetic",
        "en",
        "count",
        200,
        300,
    ),
    "passage_retrieval_en": (
        "39b96b7fa52bdd2aa2bde34ea199158505201b9a0a2c3ce94e80249293f60431",
        32,
        "synthetic",
        "en",
        "retrieval",
        200,
        300,
    ),
    "passage_retrieval_zh": (
        "c1e2346e245eb365bc33a1503cde2e473948a2aad51c3e4c72893e61ab074d60",
        32,
        "synthetic",
        "zh",
        "retrieval_zh",
        200,
        None,
    ),
    "lcc": (
        "6a1f24cf0bb83cd90f1fca8f0dd24801626c2aaea29db834ddc83b950e71190e",
        64,
        "code",
        "code",
        "edit_similarity",
        500,
        300,
    ),
    "repobench-p": (
        "ee9ec182ea5ffeb70a7140d55baea97264a8612d88226d323afa90859c36240c",
        64,
        "code",
        "code",
        "edit_similarity",
        500,
        300,
    ),
}
NOT_WRAPPED = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
FIRST_LINE = {"trec", "triviaqa", "samsum", "lsht"}


def _published() -> dict[str, Task]:
    return {name: task for name, task in load_tasks().items() if task.group == "longbench"}


def test_datasets_equal_the_published_table() -> None:
    table = {
        name: (
            hashlib.sha256(task.template.encode()).hexdigest(),
            task.max_new_tokens,
            task.category,
            task.language,
            task.metric,
            task.rows,
            task.rows_e,
        )
        for name, task in _published().items()
    }
    assert table == PUBLISHED


def test_there_are_21_datasets_13_of_longbench_e_and_4750_rows() -> None:
    tasks = _published().values()
    assert len(tasks) == 21
    assert sum(task.rows_e is not None for task in tasks) == 13
    assert sum(task.rows or 0 for task in tasks) == 4750


@pytest.mark.parametrize("name", PUBLISHED)
def test_chat_first_line_and_newline_stop_rules(name: str) -> None:
    task = load_tasks()[name]
    assert task.chat == (name not in NOT_WRAPPED)
    assert task.first_line == (name in FIRST_LINE)
    assert task.newline_stop == (name == "samsum")
    assert task.template_sha256 == PUBLISHED[name][0]
    assert callable(load_metric(task.metric))


def test_templates_and_lengths_equal_the_official_files(fixtures_dir: Path) -> None:
    prompts = json.loads((fixtures_dir / "official" / "dataset2prompt.json").read_bytes())
    caps = json.loads((fixtures_dir / "official" / "dataset2maxlen.json").read_bytes())
    assert {name: task.template for name, task in _published().items()} == prompts
    assert {name: task.max_new_tokens for name, task in _published().items()} == caps


def test_every_metric_is_used_and_unknown_ones_are_refused() -> None:
    with pytest.raises(UsageError, match="no metric 'bleu'") as failure:
        load_metric("bleu")
    offered = str(failure.value).split("Metrics: ")[1].rstrip(".").split(", ")
    assert offered == sorted({task.metric for task in (load_tasks() | load_ruler_tasks([4096])).values()})


def test_file_names_and_row_counts_of_longbench_e() -> None:
    trec, lsht = load_tasks()["trec"], load_tasks()["lsht"]
    assert (trec.file_stem(False), trec.file_stem(True)) == ("trec", "trec_e")
    assert (trec.published_rows(False), trec.published_rows(True)) == (200, 300)
    assert lsht.published_rows(True) is None


ENGLISH = [name for name, row in PUBLISHED.items() if row[3] != "zh"]
CHINESE = ["multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("all", list(PUBLISHED)),
        ("en", ENGLISH),
        ("zh", CHINESE),
        ("code", ["lcc", "repobench-p"]),
        ("few_shot", ["trec", "triviaqa", "samsum", "lsht"]),
        ("synthetic", ["passage_count", "passage_retrieval_en", "passage_retrieval_zh"]),
        ("qasper", ["qasper"]),
        (" lcc , qasper,qasper ,code", ["qasper", "lcc", "repobench-p"]),
    ],
)
def test_select_tasks_by_name_and_group(names: str, expected: list[str]) -> None:
    assert [task.name for task in select_tasks(names)] == expected


def test_the_english_group_has_16_datasets() -> None:
    assert len(ENGLISH) == 16


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("all", [name for name, row in PUBLISHED.items() if row[6] is not None]),
        ("few_shot", ["trec", "triviaqa", "samsum"]),
        ("2wikimqa,trec", ["2wikimqa", "trec"]),
    ],
)
def test_select_tasks_of_longbench_e(names: str, expected: list[str]) -> None:
    assert [task.name for task in select_tasks(names, e=True)] == expected


@pytest.mark.parametrize(
    ("names", "e", "message"),
    [
        ("hotpot", False, "no dataset 'hotpot'.*narrativeqa.*Groups: all, en, zh, single_doc_qa"),
        ("", False, "no dataset ''"),
        ("qasper,", False, "no dataset ''"),
        ("qasper_e", True, "no dataset 'qasper_e'.*qasper"),
        ("musique", True, "'musique' is not part of LongBench-E.*qasper.*repobench-p"),
        ("zh", True, "'zh' is not part of LongBench-E"),
    ],
)
def test_invalid_selections_list_the_choices(names: str, e: bool, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        select_tasks(names, e)


@pytest.mark.parametrize(("field", "value"), [("category", "qa"), ("language", "de")])
def test_a_table_with_a_wrong_value_is_refused(field: str, value: str) -> None:
    fields = {
        "name": "new",
        "template": "{context}",
        "max_new_tokens": 8,
        "metric": "count",
        "category": "code",
        "language": "en",
        "rows": 1,
    }
    with pytest.raises(UsageError, match=rf"\[new\]: {field} '{value}'"):
        Task(**{**fields, field: value})  # type: ignore[arg-type]


OWN = {"template": "{context}?", "max_new_tokens": 8, "metric": "count", "category": "few_shot", "language": "zh"}


@pytest.fixture
def add_table(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Add the table [mine] to datasets.toml for one test: OWN with changes; None removes a field."""

    def add(**changes: Any) -> None:
        table = {key: value for key, value in {**OWN, **changes}.items() if value is not None}
        tables = {**read_tables("datasets.toml"), "mine": table}
        monkeypatch.setattr(
            "sparsecache.longbench.tasks.read_tables",
            lambda name: tables if name == "datasets.toml" else read_tables(name),
        )

    return add


@pytest.mark.parametrize("language", ["en", "zh", "code"])
def test_a_custom_dataset_is_in_no_group_and_has_any_length(language: str, add_table: Callable[..., None]) -> None:
    groups = ["all", "en", "zh", *{row[2] for row in PUBLISHED.values()}]
    before = {group: [task.name for task in select_tasks(group)] for group in groups}
    add_table(language=language)
    assert {group: [task.name for task in select_tasks(group)] for group in groups} == before
    mine = load_tasks()["mine"]
    assert (mine.rows, mine.rows_e, mine.published_rows(False)) == (None, None, None)
    assert [task.name for task in select_tasks("mine,qasper")] == ["qasper", "mine"]
    with pytest.raises(UsageError, match="'mine' is not part of LongBench-E"):
        select_tasks("mine", e=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_token": 8, "chats": True}, "unknown fields chats, max_new_token"),
        ({"metric": None, "category": None}, "has no category, metric"),
        ({"category": "qa"}, "category 'qa'"),
        ({"language": "de"}, "language 'de'"),
        ({"template": "{context} {question}"}, "template uses question; a row has input, context"),
    ],
    ids=["unknown", "missing", "category", "language", "template"],
)
def test_errors_in_a_table_name_the_dataset(
    changes: dict[str, Any], message: str, add_table: Callable[..., None]
) -> None:
    add_table(**changes)
    with pytest.raises(UsageError, match=rf"configs/datasets\.toml \[mine\].*{message}"):
        load_tasks()
