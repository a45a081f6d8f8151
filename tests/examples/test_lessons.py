"""Lessons have the promised length, match the format of rows, and flag predictable text."""

import re
from collections.abc import Iterator
from dataclasses import replace
from statistics import mean
from typing import Any

import pytest
from tokenizers import Tokenizer

import lessons
from lesson_tokenizer import Encoder
from lessons import EOS, MIX, lesson
from sparsecache.longbench.tasks import select_tasks
from sparsecache.synthetic import rows
from sparsecache.synthetic.draft import Draft, QAPair, Rng, split_marks, strip_marks
from sparsecache.synthetic.rows import make_rows

TASKS = {task.name: task for task in select_tasks("all")}  # the published ones
REPEATED = [
    "narrativeqa",
    "qasper",
    "multifieldqa_en",
    "multifieldqa_zh",
    "hotpotqa",
    "2wikimqa",
    "musique",
    "dureader",
]
LABELLED = ["trec", "lsht", "triviaqa", "lcc"]


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Draft, list[QAPair]]]:
    """Every draft that a lesson uses, with the follow-up questions drawn from it."""
    made: list[tuple[Draft, list[QAPair]]] = []

    def spy(*arguments: Any) -> Draft:
        draft = rows.make_draft(*arguments)
        asked: list[QAPair] = []

        def follow_ups() -> Iterator[QAPair]:
            for question in draft.follow_ups:
                asked.append(question)
                yield question

        made.append((draft, asked))
        return replace(draft, follow_ups=follow_ups())

    monkeypatch.setattr(lessons, "make_draft", spy)
    return made


def test_every_dataset_has_a_share() -> None:
    assert list(MIX) == list(TASKS)
    assert sum(MIX.values()) == pytest.approx(1)


@pytest.mark.parametrize("tokens", [256, 1024, 8192])
@pytest.mark.parametrize("dataset", MIX)
def test_a_lesson_has_at_most_its_tokens(dataset: str, tokens: int, encode: Encoder) -> None:
    made = [lesson(dataset, tokens, str(number), encode) for number in range(12 if tokens < 2000 else 3)]
    for ids, flags in made:
        assert len(ids) == len(flags) <= tokens
        assert ids[0] == 0 and ids.count(0) == 1 and 2 not in ids
        assert len(ids) > 0.4 * tokens
        assert ids.count(EOS) >= 1
        assert all(flag for token, flag in zip(ids, flags, strict=True) if token == EOS)
    assert mean(len(ids) for ids, _ in made) > 0.7 * tokens


@pytest.mark.parametrize("dataset", MIX)
def test_the_same_key_gives_the_same_lesson(dataset: str, encode: Encoder) -> None:
    assert lesson(dataset, 700, "a", encode) == lesson(dataset, 700, "a", encode)
    assert lesson(dataset, 700, "a", encode) != lesson(dataset, 700, "b", encode)


@pytest.mark.parametrize("dataset", MIX)
def test_the_first_question_has_the_format_of_a_row(
    dataset: str, encode: Encoder, drafts: list[tuple[Draft, list[QAPair]]]
) -> None:
    for number in range(8):
        ids, _ = lesson(dataset, 1024, str(number), encode)
        draft, _ = drafts[-1]
        row = {"context": strip_marks(draft.context), "input": strip_marks(draft.input)}
        prompt = encode(TASKS[dataset].template.format(**row))
        answer = ids[1 + len(prompt) : ids.index(EOS)]
        assert ids[1 : 1 + len(prompt)] == prompt
        assert answer in (encode(draft.answers[0]), encode(f" {draft.answers[0]}"))


@pytest.mark.parametrize("dataset", MIX)
def test_marks_and_answers_are_flagged(
    dataset: str, tokenizer: Tokenizer, encode: Encoder, drafts: list[tuple[Draft, list[QAPair]]]
) -> None:
    for number in range(8):
        ids, flags = lesson(dataset, 1024, str(number), encode)
        draft, asked = drafts[-1]
        marks = [text for text, marked in split_marks(draft.context + draft.input) if marked]
        answers = [draft.answers[0], *(answer for _, answer in asked)][: ids.count(EOS)]
        assert _flagged(tokenizer, ids, flags) == [text.strip() for text in [*marks, *answers]]


def _flagged(tokenizer: Tokenizer, ids: list[int], flags: list[int]) -> list[str]:
    """The texts of the flagged runs, each up to its EOS."""
    texts: list[str] = []
    run: list[int] = []
    for token, flag in zip(ids, flags, strict=True):
        if flag and token != EOS:
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run).strip())
            run = []
    return texts


@pytest.mark.parametrize("dataset", [*REPEATED, *LABELLED, "qmsum"])
def test_marked_text_occurs_earlier(dataset: str, encode: Encoder, drafts: list[tuple[Draft, list[QAPair]]]) -> None:
    marks = 0
    for number in range(8):
        lesson(dataset, 1500, str(number), encode)
        before = ""
        for text, marked in split_marks(drafts[-1][0].context):
            if marked and dataset != "lcc":
                assert re.search(rf"\b{re.escape(text.strip())}", before) or text.strip() in before
            elif marked:
                assert text.strip().removeprefix("result = ") in before
            before += text
            marks += marked
    assert marks > 3


@pytest.mark.parametrize("dataset", MIX)
def test_rows_have_no_repeats_and_no_marks(dataset: str) -> None:
    for row in make_rows(dataset, 3, 1024, 0):
        text = row["context"] + row["input"] + row["answers"][0]
        assert "\x02" not in text and "\x03" not in text
        assert not re.search("As noted before|Once more: |To recall|如前所述|再说一遍|前面提到", text)


def test_one_lesson_in_ten_has_only_its_first_question(encode: Encoder) -> None:
    asked = [lesson("narrativeqa", 600, str(number), encode)[0].count(EOS) for number in range(200)]
    assert 8 <= asked.count(1) <= 35
    assert max(asked) >= 6


def test_lessons_and_rows_share_no_key(monkeypatch: pytest.MonkeyPatch, encode: Encoder) -> None:
    keys: dict[str, set[str]] = {"lessons": set(), "sample": set()}
    for name, module in (("lessons", lessons), ("sample", rows)):

        def recorded(seed: str, seen: set[str] = keys[name]) -> Rng:
            seen.add(seed)
            return Rng(seed)

        monkeypatch.setattr(module, "Rng", recorded)
    for dataset in MIX:
        make_rows(dataset, 2, 300, 0)
        lesson(dataset, 300, "0/300/0", encode)
    assert all(key.startswith("lesson/") for key in keys["lessons"]) and keys["lessons"]
    assert not any(key.startswith("lesson") for key in keys["sample"]) and keys["sample"]
