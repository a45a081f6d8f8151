"""Synthetic rows have LongBench's format and the requested length, and their context answers the question."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from sparsecache.errors import UsageError
from sparsecache.longbench.jsonl import dumps
from sparsecache.longbench.scores import ScoringOptions, score_file
from sparsecache.longbench.tasks import load_tasks, select_tasks
from sparsecache.synthetic import chinese, english, few_shot, passages
from sparsecache.synthetic.draft import estimate_tokens
from sparsecache.synthetic.facts import Relation, World
from sparsecache.synthetic.rows import make_rows

KEYS = ["input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"]
DATASETS = [task.name for task in select_tasks("all")]
STATED = {
    "narrativeqa": english.STORY,
    "multifieldqa_en": english.PEOPLE,
    "multifieldqa_zh": chinese.PEOPLE,
}
CHAINED = {
    "hotpotqa": (english.PEOPLE, 2),
    "2wikimqa": (english.WORKS, 2),
    "musique": (english.PEOPLE, 3),
    "dureader": (chinese.PEOPLE, 2),
}
CLASSIFIED = {"trec": few_shot.CLASSES, "lsht": chinese.CLASSES}
RETRIEVED = {"passage_retrieval_en": passages.PLACES, "passage_retrieval_zh": chinese.PLACES}
MARKS = {
    "gov_report": r"Key finding: ([^.]+\.)",
    "multi_news": r"In short: ([^.]+\.)",
    "vcsum": r"结论：([^。]+。)",
}


@pytest.mark.parametrize("dataset", DATASETS)
def test_rows_have_the_benchmarks_format(dataset: str) -> None:
    for row in make_rows(dataset, 3, 512, 0):
        assert list(row) == KEYS
        assert row["dataset"] == dataset
        assert row["language"] == {"code": "python"}.get(load_tasks()[dataset].language, row["language"])
        assert row["answers"] and all(isinstance(answer, str) and answer for answer in row["answers"])
        assert row["length"] == _count(row)
        assert (row["all_classes"] is not None) == (dataset in CLASSIFIED)
        assert re.fullmatch("[0-9a-f]{48}", row["_id"])


def _count(row: dict[str, Any]) -> int:
    texts = [row["context"], row["input"], row["answers"][0]]
    return sum(len(text) if row["language"] == "zh" else len(text.split()) for text in texts)


@pytest.mark.parametrize("tokens", [256, 400, 1024, 4096, 32768])
@pytest.mark.parametrize("dataset", DATASETS)
def test_prompts_have_the_requested_length(dataset: str, tokens: int) -> None:
    template = load_tasks()[dataset].template
    for row in make_rows(dataset, 8 if tokens <= 1024 else 1, tokens, 7):
        assert estimate_tokens(template.format(**row)) == pytest.approx(tokens, rel=0.15)


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_row_does_not_depend_on_the_number_of_rows(dataset: str) -> None:
    assert make_rows(dataset, 2, 300, 1) == make_rows(dataset, 10, 300, 1)[:2]


def test_rows_are_the_same_in_another_process() -> None:
    code = (
        "import json; from sparsecache.synthetic.rows import make_rows; "
        f"print(json.dumps([make_rows(name, 2, 600, 3) for name in {DATASETS!r}]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(printed) == [make_rows(name, 2, 600, 3) for name in DATASETS]


def test_ids_are_unique() -> None:
    rows = [
        row for name in DATASETS for seed in (0, 1) for tokens in (256, 300) for row in make_rows(name, 3, tokens, seed)
    ]
    assert len({row["_id"] for row in rows}) == len(rows)
    assert len({row["context"] + row["input"] for row in rows}) == len(rows)


@pytest.mark.parametrize("dataset", STATED)
def test_the_answer_is_stated_once_among_distractors(dataset: str) -> None:
    for row in make_rows(dataset, 20, 512, 0):
        stated = _statements(row["context"], _asked(row["input"], STATED[dataset]))
        assert [value for _, value in stated].count(row["answers"][0]) == 1
        assert len(stated) >= 2
        assert len({entity for entity, _ in stated}) == len(stated)


def _asked(question: str, world: World) -> Relation:
    """Return the relation of a question, or of one step of it."""
    for relation in (*world.relations, *world.links):
        pattern = re.escape(relation.question.rstrip("?？")).replace(r"\{e\}", ".+") + "[?？]?"
        if re.fullmatch(pattern, question, re.IGNORECASE):
            return relation
    raise AssertionError(question)


def _statements(text: str, relation: Relation) -> list[tuple[str, str]]:
    """Return entity and value of every sentence that states the relation."""
    escaped = [re.escape(says) for says in relation.statements]
    patterns = [says.replace(r"\{e\}", "(?P<e>.+?)").replace(r"\{v\}", "(?P<v>.+?)") for says in escaped]
    stated = []
    for sentence in re.split(r"(?<=[.?。])\s*|\n", text):
        readings = [match for pattern in patterns if (match := re.fullmatch(pattern, sentence))]
        if readings:  # "In the evenings X plays Y." is also read as a sentence about "In the evenings X".
            best = min(readings, key=lambda match: len(match["e"]))
            stated.append((best["e"], best["v"]))
    return stated


@pytest.mark.parametrize("dataset", [*STATED, *CHAINED, *RETRIEVED, "lcc", "repobench-p"])
def test_the_evidence_is_at_random_positions(dataset: str) -> None:
    rows = make_rows(dataset, 200, 1024, 0)
    places = [row["context"].index(_evidence(row)) / len(row["context"]) for row in rows]
    assert 0.4 < mean(places) < 0.6
    assert min(places) < 0.1 and max(places) > 0.9


def _evidence(row: dict[str, Any]) -> str:
    """Return the text in the context that determines the answer; the last one of a chain."""
    answer: str = row["answers"][0]
    if row["dataset"] in CHAINED:
        return re.split("[,，]", answer)[-1].strip()
    return "def " + answer.split("= ")[1] if "result = " in answer else answer


@pytest.mark.parametrize("dataset", CHAINED)
def test_the_hops_of_a_question_lead_to_its_answer(dataset: str) -> None:
    world, steps = CHAINED[dataset]
    for row in make_rows(dataset, 20, 600, 0):
        asked = [_asked(part, world) for part in re.split(", and |, |，", row["input"])]
        passages = re.split(r"(?:Passage \d+:\n|文章\d+\n标题：)", row["context"])[1:]
        titles = [passage.split("\n")[0] for passage in passages]
        subject = next(title for title in titles if title in row["input"])
        values = []
        for relation in asked:
            stated = _statements(row["context"], relation)
            values.append(dict(stated)[subject])
            assert len({entity for entity, _ in stated}) == len(stated) >= 2
            subject = values[-1]
        assert row["answers"] == [world.list_separator.join(values)]
        assert len(values) == steps and [value for _, value in stated].count(values[-1]) == 1


def test_hops_need_each_of_their_passages() -> None:
    for row in make_rows("musique", 10, 1024, 0):
        passages = re.split(r"Passage \d+:\n", row["context"])[1:]
        titles = [passage.split("\n")[0] for passage in passages]
        start = next(title for title in titles if title in row["input"])
        reached = [passage for passage in passages if row["answers"][0].split(", ")[-1] in passage]
        assert len(reached) == 1 and start not in reached[0]
        assert len(titles) == len(set(titles)) and len(titles) > 3


def test_qasper_has_every_kind_of_answer() -> None:
    rows = make_rows("qasper", 200, 400, 0)
    answers = [row["answers"][0] for row in rows]
    assert 10 <= answers.count("yes") + answers.count("no") <= 40
    assert 10 <= answers.count("unanswerable") <= 40
    assert "yes" in answers and "no" in answers
    for row in rows:
        stated = row["answers"][0].lower() in row["context"].lower()
        assert stated or row["answers"][0] in ("yes", "no", "unanswerable")
        named = re.findall(r"\w+-\d", row["input"])[0] in row["context"]
        assert named == (row["answers"] != ["unanswerable"])


@pytest.mark.parametrize("dataset", MARKS)
def test_summaries_are_the_marked_sentences(dataset: str) -> None:
    for row in make_rows(dataset, 10, 1024, 0):
        found = re.findall(MARKS[dataset], row["context"])
        assert len(found) >= 2
        assert row["answers"] == [("" if row["language"] == "zh" else " ").join(found)]


def test_qmsum_answers_with_all_facts_about_one_person() -> None:
    for row in make_rows("qmsum", 10, 2048, 0):
        person = row["input"].removeprefix("Summarize what was said about ").removesuffix(".")
        speech = re.sub(r"^\w+: ", "", row["context"], flags=re.MULTILINE)
        stated = [(relation, dict(_statements(speech, relation))) for relation in english.PEOPLE.relations]
        *first, last = (
            known[person].join(relation.clause.split("{v}")) for relation, known in stated if person in known
        )
        assert row["answers"] == [f"{person} {', '.join(first)} and {last}."]


@pytest.mark.parametrize("dataset", CLASSIFIED)
def test_classes_are_shown_by_example(dataset: str) -> None:
    for row in make_rows(dataset, 10, 512, 0):
        assert row["answers"][0] in row["all_classes"]
        assert row["answers"][0] in re.findall(r"(?:Type: |类别：)(.+)", row["context"])
        nested = [(a, b) for a in row["all_classes"] for b in row["all_classes"] if a != b and a in b]
        assert not nested


@pytest.mark.parametrize("dataset", CLASSIFIED)
def test_half_of_the_rows_permute_the_class_names(dataset: str) -> None:
    rows = make_rows(dataset, 60, 300, 0)
    assert all(row["all_classes"] == list(CLASSIFIED[dataset]) for row in rows)
    assert 15 <= sum(_has_usual_names(row["context"], CLASSIFIED[dataset]) for row in rows) <= 45


def _has_usual_names(context: str, classes: dict[str, tuple[str, ...]]) -> bool:
    """Return whether every example has the label of the class that its text is made for."""
    shown = re.findall(r"(?:Question: |新闻内容：\n)((?:.+\n)+?)(?:Type: |类别：)(.+)", context)
    assert shown
    return all(
        any(re.match(re.sub(r"\\{\w\\}", ".+", re.escape(form)), text) for form in classes[label])
        for text, label in shown
    )


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("tokens", [300, 2048])
def test_the_answers_score_100(dataset: str, tokens: int, tmp_path: Path) -> None:
    rows = [{**row, "pred": row["answers"][0]} for row in make_rows(dataset, 25, tokens, 0)]
    file = tmp_path / f"{dataset}.jsonl"
    file.write_bytes("".join(dumps(row) + "\n" for row in rows).encode())
    score = score_file(file, load_tasks()[dataset], False, len(rows), ScoringOptions())
    assert (score.summary.score, score.summary.n, score.warnings) == (100, 25, [])


@pytest.mark.parametrize(("dataset", "end"), [("triviaqa", "Answer:"), ("samsum", "Summary:")])
def test_few_shot_inputs_end_before_the_answer(dataset: str, end: str) -> None:
    for row in make_rows(dataset, 10, 1024, 0):
        assert row["input"].endswith(end) and row["input"].count(end) == 1
        assert row["context"].count(end) >= 2
        assert dataset != "triviaqa" or row["answers"][0] in row["input"]


@pytest.mark.parametrize("tokens", [256, 1024, 8192])
def test_the_count_is_that_of_distinct_paragraphs(tokens: int) -> None:
    for row in make_rows("passage_count", 10, tokens, 0):
        texts = [text.split(": ", 1)[1] for text in row["context"].split("\n\n")]
        assert row["answers"] == [str(len(set(texts)))]
        assert 2 <= len(set(texts)) < len(texts) and len(set(texts)) <= 20


@pytest.mark.parametrize("dataset", RETRIEVED)
@pytest.mark.parametrize("tokens", [256, 2048])
def test_the_abstract_is_of_the_named_paragraph(dataset: str, tokens: int) -> None:
    for row in make_rows(dataset, 10, tokens, 0):
        values = _abstract_values(row["input"], RETRIEVED[dataset])
        assert len(values) == 2
        paragraphs = dict(re.split("[:：]", text, maxsplit=1) for text in row["context"].split("\n\n"))
        named = [name for name, text in paragraphs.items() if all(value in text for value in values)]
        assert row["answers"] == named


def _abstract_values(abstract: str, world: World) -> list[str]:
    """Return the values of the facts that an abstract paraphrases."""
    clauses = [re.escape(relation.clause).replace(r"\{v\}", "(.+?)") for relation in world.relations]
    found = [re.search(clause + r"(?= and |\.$|，而且|。$)", abstract) for clause in clauses]
    return [match[1] for match in found if match]


@pytest.mark.parametrize("dataset", ["lcc", "repobench-p"])
def test_the_next_line_follows_from_a_definition(dataset: str) -> None:
    for row in make_rows(dataset, 10, 1024, 0):
        name, arguments = re.fullmatch(r" {4}result = (\w+)\((.+)\)", row["answers"][0]).groups()  # type: ignore[union-attr]
        code = row["context"] + row["input"]
        assert row["context"].count(f"def {name}({arguments}):") == 1
        assert code.endswith(f"    # {name.replace('_', ' ')}\n")
        assert row["answers"][0] not in code
        assert len(re.findall(r"def \w+_\w+\(", row["context"])) >= 3
        if dataset == "lcc":
            compile(code, "sample.py", "exec")


def test_bad_arguments_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="no synthetic rows of dataset 'triva'.*triviaqa"):
        make_rows("triva", 1, 512, 0)
    with pytest.raises(UsageError, match="256 to 32768"):
        make_rows("lcc", 1, 255, 0)
    with pytest.raises(UsageError, match="-1"):
        make_rows("lcc", -1, 512, 0)
