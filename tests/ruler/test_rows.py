"""Rows of RULER: their length, their answers as a reader of the prompt finds them, and what they depend on."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsecache.errors import UsageError
from sparsecache.longbench.prompts import Prompter
from sparsecache.longbench.tasks import load_ruler_tasks, ruler_names
from sparsecache.ruler.fill import TooLongError, fill
from sparsecache.ruler.questions import read_hotpotqa, read_squad
from sparsecache.ruler.source import RulerSource
from sparsecache.ruler.texts import WORD_TASKS, RulerTexts, read_essays
from sparsecache.runner.settings import Settings

NEEDLES = {  # lines or sentences with a value, distinct keys, values asked for
    "niah_single_1": (1, 1, 1), "niah_single_2": (1, 1, 1), "niah_single_3": (1, 1, 1),
    "niah_multikey_1": (4, 4, 1), "niah_multikey_2": (None, None, 1), "niah_multikey_3": (None, None, 1),
    "niah_multivalue": (4, 1, 4), "niah_multiquery": (4, 4, 4),
}  # fmt: skip
WORDLESS = [name for name in ruler_names() if name not in WORD_TASKS]


@pytest.fixture(autouse=True)
def _words(request: pytest.FixtureRequest) -> None:
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    if name in WORD_TASKS:
        pytest.importorskip("wonderwords", reason="the extra `ruler` is not installed")


@pytest.mark.parametrize("name", ruler_names())
@pytest.mark.parametrize("length", [1024, 4096])
def test_prompts_fill_the_length(name: str, length: int, make_rows: Callable[..., Any], prompter: Prompter) -> None:
    task, rows = make_rows(name, length)
    for row in rows:
        prompt = prompter.build(task, row)
        budget = length - task.max_new_tokens
        assert 0.95 * budget <= len(prompt.token_ids) <= budget, name
        assert not prompt.truncated and row["length"] == len(prompt.token_ids) + task.max_new_tokens
        assert prompt.end.endswith("Model:" + task.answer_prefix.format(**row))


@pytest.mark.parametrize("name", NEEDLES)
def test_needles_are_what_the_question_asks_for(name: str, make_rows: Callable[..., Any]) -> None:
    needles, keys, asked = NEEDLES[name]
    _, rows = make_rows(name)
    for row in rows:
        found = re.findall(r"One of the special magic (\w+) for (\S+|\S+ \S+|\S+ \S+ \S+) is: (\S+)\.", row["context"])
        queries = re.split(r", and |, ", row["input"])
        assert Counter(value for _, key, value in found if key in queries) == Counter(row["answers"])
        assert len(row["answers"]) == asked and {kind for kind, _, _ in found} <= {"numbers", "uuids"}
        assert (len(found), len({key for _, key, _ in found})) == (needles, keys) if needles else len(found) > 40
        assert all(row["context"].count(value) == 1 for value in row["answers"])
    assert rows[0]["context"].count(rows[1]["answers"][0]) == 0


def test_essays_are_read_in_order_and_repeated(make_rows: Callable[..., Any]) -> None:
    pytest.importorskip("wonderwords")
    _, (row, _) = make_rows("niah_single_2")
    text = re.sub(r"(^| )One of the special magic numbers for .*? is: \d+\.", "", row["context"]).strip()
    assert text.startswith("The alpha number 0 is here. The alpha number 1 is here.")
    assert text.count("alpha number 7 is") >= 2 and "beta number 149 is" in text and "not an essay" not in text


def test_a_chain_of_variables_has_the_value_asked_for(make_rows: Callable[..., Any]) -> None:
    task, rows = make_rows("vt")
    for row in rows:
        values: dict[str, str] = {}
        for name, end in re.findall(r"^VAR (\w+) = (.+?) ?$", row["context"], flags=re.MULTILINE):
            values[name] = values[end.removeprefix("VAR ")] if end.startswith("VAR ") else end
        assert sorted(name for name, value in values.items() if value == row["input"]) == sorted(row["answers"])
        assert len(row["answers"]) == 5 and all(re.fullmatch("[A-Z]{5}", name) for name in row["answers"])
        assert row["examples"].startswith(task.template.removeprefix("{examples}")[:40])
        assert re.search(r"they are:  (?:[A-Z]{3} ){4}[A-Z]{3}\n\n$", row["examples"])


@pytest.mark.parametrize(("length", "many", "few"), [(4096, 30, 3), (1024, 6, 1)])
def test_common_words_are_the_most_frequent(length: int, many: int, few: int, make_rows: Callable[..., Any]) -> None:
    pytest.importorskip("wonderwords")
    _, rows = make_rows("cwe", length)
    for row in rows:
        counts = Counter(re.findall(r"\d+\. (.+?)(?= \d+\. |$)", row["context"]))
        assert {word for word, _ in counts.most_common(10)} == set(row["answers"])
        assert sorted(set(counts.values())) == [few, many]
        shown = row["examples"].partition("\n")[2].partition("\n")[0]
        answer = re.findall(r"\d+\. (.+?)(?= \d+\. |$)", row["examples"].rpartition("are:")[2].strip())
        example = Counter(re.findall(r"\d+\. (.+?)(?= \d+\. |$)", shown))
        assert {word for word, _ in example.most_common(10)} == set(answer)


def test_coded_words_follow_the_zeta_distribution(make_rows: Callable[..., Any]) -> None:
    _, rows = make_rows("fwe")
    for row in rows:
        counts = Counter(row["context"].split(" "))
        noise, *others = counts.most_common(4)
        assert noise[0] == "..." and [word for word, _ in others] == row["answers"]
        assert [noise[1] / count for _, count in others] == pytest.approx([4, 9, 16], rel=0.03)
        assert all(re.fullmatch("[a-z]{6}", word) for word in counts if word != "...")


@pytest.mark.parametrize(("name", "own"), [("qa_1", 1), ("qa_2", 4)])
def test_questions_stand_among_documents(name: str, own: int, make_rows: Callable[..., Any]) -> None:
    _, rows = make_rows(name, rows=3)
    assert [row["input"][-2:] for row in rows] == ["0?", "1?", "2?"]  # the file's order
    for at, row in enumerate(rows):
        documents = re.split(r"(?:^|\n\n)Document \d+:\n", row["context"])[1:]
        assert row["answers"][0] == f"Word{at}" and len(documents) == len(set(documents)) > own
        assert sum(f"Paragraph {at + more}. " in row["context"] for more in range(own)) == own
        assert re.findall(r"^Document (\d+):$", row["context"], re.MULTILINE) == [
            str(number) for number in range(1, len(documents) + 1)
        ]


def test_documents_repeat_in_a_long_prompt(make_rows: Callable[..., Any]) -> None:
    _, (row,) = make_rows("qa_1", 8192, rows=1)
    documents = Counter(re.split(r"(?:^|\n\n)Document \d+:\n", row["context"])[1:])
    assert len(documents) == 60 and max(documents.values()) - min(documents.values()) == 1


@pytest.mark.parametrize("name", WORDLESS)
def test_rows_depend_on_the_seed_and_the_length_only(name: str, make_rows: Callable[..., Any]) -> None:
    _, rows = make_rows(name, 1024)
    assert make_rows(name, 1024)[1] == rows
    assert make_rows(name, 1024, rows=1)[1] == rows[:1]
    others = [make_rows(name, 1024, seed=2)[1], make_rows(name, 1088)[1]]
    assert all(other[0]["context"] != rows[0]["context"] for other in others)
    assert len({row["_id"] for made in (rows, *others) for row in made}) == 6


def test_rows_stay_the_same_in_later_versions(texts: RulerTexts) -> None:
    source = RulerSource(Prompter(_Characters(), 2**20), 1, 42, texts)  # type: ignore[arg-type]
    task = load_ruler_tasks([4096])["niah_multikey_3_4096"]
    text = source.read(task, False)[1]
    assert hashlib.sha256(text).hexdigest()[:16] == "a003ea102c84be60"


class _Characters:
    """A tokenizer whose tokens are characters."""

    bos_token = bos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


def test_a_length_that_the_question_exceeds_is_refused(make_rows: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=r"--ruler_length 600 is too short for vt: its shortest prompt and 30 new"):
        make_rows("vt", 600)


@pytest.mark.parametrize("slope", [0.3, 7, 90])
def test_fill_finds_the_largest_size_nearly(slope: float) -> None:
    tried: list[int] = []

    def make(size: int) -> int:
        tried.append(size)
        return int(200 + slope * size)

    size, tokens = fill(make, lambda tokens: tokens, 4000)
    assert tokens <= 4000 and (tokens >= 3960 or make(size + 1) > 4000) and len(tried) < 12
    assert fill(make, lambda tokens: tokens, 4000, max_size=5) == (5, make(5))
    with pytest.raises(TooLongError, match="has (200|207|290) tokens"):
        fill(make, lambda tokens: tokens, 100)


def check(datasets: str, **more: Any) -> None:
    Settings(model="demo", datasets=datasets, **more).check()


def test_tasks_without_their_text_are_refused_by_name(texts: RulerTexts) -> None:
    pytest.importorskip("wonderwords")
    with pytest.raises(UsageError) as failure:
        check("ruler")
    message = str(failure.value)
    essays = "niah_single_2, niah_single_3, niah_multikey_1, niah_multivalue, niah_multiquery"
    assert f"--ruler_essays FOLDER (essays as .txt files) for {essays};" in message
    assert "(dev-v2.0.json) for qa_1;" in message and "(hotpot_dev_distractor_v1.json) for qa_2." in message
    free = message.partition("--datasets ")[2].rstrip(".")
    assert free == "niah_single_1,niah_multikey_2,niah_multikey_3,vt,cwe,fwe"
    check(free)
    check("ruler", ruler_essays=texts.essays, ruler_squad=texts.squad, ruler_hotpotqa=texts.hotpotqa)


def test_tasks_without_words_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsecache.ruler.words.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="The English words for cwe are missing. Install the package wonderwords: pip"):
        check("cwe,vt")
    check("vt,fwe,niah_multikey_3")


@pytest.mark.parametrize("length", ["", "511", "1048577", "4k", "4096,", "-4096", "4096;8192", "٤٠٩٦"])
def test_a_wrong_length_is_refused(length: str) -> None:
    with pytest.raises(UsageError, match="must be a number of tokens from 512 to 1048576"):
        check("vt", ruler_length=length)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is not a file of"),
        ("{", "is not a file of"),
        ('{"data": [{}]}', "is not a file of"),
        ("", "is not a file"),
    ],
)
@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_another_file_of_questions_is_refused(
    name: str, content: str, message: str, tmp_path: Path, prompter: Prompter
) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    if (name, content) == ("qa_2", "[]"):
        message = "holds no question with an answer"
    source = RulerSource(prompter, 1, 0, RulerTexts(None, path, path))
    with pytest.raises(UsageError, match=message):
        source.read(load_ruler_tasks([1024])[f"{name}_1024"], False)


def test_a_folder_without_essays_is_refused(tmp_path: Path, prompter: Prompter) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    source = RulerSource(prompter, 1, 0, RulerTexts(tmp_path))
    with pytest.raises(UsageError, match=r"holds no text in \.txt files"):
        source.read(load_ruler_tasks([1024])["niah_single_2_1024"], False)


def test_a_question_that_is_no_text_is_refused(tmp_path: Path) -> None:
    def squad(context: object = "Words.", question: object = "Who?", answer: object = "Ada") -> Any:
        asked = {"question": question, "answers": [{"text": answer}]}
        return {"data": [{"paragraphs": [{"context": context, "qas": [asked]}]}]}

    def hotpotqa(context: object = (("Title", ["Words."]),), question: object = "Who?", answer: object = "Ada") -> Any:
        return [{"context": context, "question": question, "answer": answer}]

    path = tmp_path / "file.json"
    for read, make in ((read_squad, squad), (read_hotpotqa, hotpotqa)):
        path.write_text(json.dumps(make()))
        assert len(read(path).questions) == 1
        for wrong in (
            {"context": None},
            {"question": None},
            {"answer": 5},
            {"answer": ["Ada"]},
            {"question": "\ud800"},
        ):
            path.write_text(json.dumps(make(**wrong)))
            with pytest.raises(UsageError, match="is not a file of"):
                read(path)
        path.write_text(json.dumps(make(answer="")))
        with pytest.raises(UsageError, match="holds no question with an answer"):
            read(path)
    for nothing in ([], [["Title", [None]]]):
        path.write_text(json.dumps(hotpotqa(nothing)))
        with pytest.raises(UsageError, match="question with an answer|is not a file of"):
            read_hotpotqa(path)


def test_an_essay_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffCafé.".encode())
    assert read_essays(tmp_path) == ("Café.",)
    (tmp_path / "b.txt").write_bytes("Café.".encode("latin-1"))
    with pytest.raises(UsageError, match=r"b\.txt is not UTF-8 text"):
        read_essays(tmp_path)


def test_more_rows_than_questions_are_refused(make_rows: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=r"has 60 questions with an answer, so --ruler_rows is at most that"):
        make_rows("qa_1", 1024, rows=61)
