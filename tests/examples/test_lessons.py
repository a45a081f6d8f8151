"""The training sequences: as long as promised, made as the sample's rows are, and flagged where text is settled."""

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
from sparsecache.synthetic.build import Draft, Question, Rng, split_marks, unmarked
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
def drafts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Draft, list[Question]]]:
    """Every draft that lessons are made of, with the further questions that were drawn from it."""
    made: list[tuple[Draft, list[Question]]] = []

    def spy(*arguments: Any) -> Draft:
        draft = rows.make_draft(*arguments)
        asked: list[Question] = []

        def more() -> Iterator[Question]:
            for question in draft.more:
                asked.append(question)
                yield question

        made.append((draft, asked))
        return replace(draft, more=more())

    monkeypatch.setattr(lessons, "make_draft", spy)
    return made


def test_every_dataset_is_drawn() -> None:
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
def test_the_first_question_is_put_as_the_sample_puts_it(
    dataset: str, encode: Encoder, drafts: list[tuple[Draft, list[Question]]]
) -> None:
    for number in range(8):
        ids, _ = lesson(dataset, 1024, str(number), encode)
        draft, _ = drafts[-1]
        row = {"context": unmarked(draft.context), "input": unmarked(draft.input)}
        prompt = encode(TASKS[dataset].template.format(**row))
        answer = ids[1 + len(prompt) : ids.index(EOS)]
        assert ids[1 : 1 + len(prompt)] == prompt
        assert answer in (encode(draft.answers[0]), encode(f" {draft.answers[0]}"))


@pytest.mark.parametrize("dataset", MIX)
def test_flags_are_on_marks_and_answers(
    dataset: str, tokenizer: Tokenizer, encode: Encoder, drafts: list[tuple[Draft, list[Question]]]
) -> None:
    for number in range(8):
        ids, flags = lesson(dataset, 1024, str(number), encode)
        draft, asked = drafts[-1]
        marks = [text for text, settled in split_marks(draft.context + draft.input) if settled]
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
def test_what_is_marked_was_settled_before(
    dataset: str, encode: Encoder, drafts: list[tuple[Draft, list[Question]]]
) -> None:
    marks = 0
    for number in range(8):
        lesson(dataset, 1500, str(number), encode)
        before = ""
        for text, settled in split_marks(drafts[-1][0].context):
            if settled and dataset != "lcc":
                assert re.search(rf"\b{re.escape(text.strip())}", before) or text.strip() in before
            elif settled:
                assert text.strip().removeprefix("result = ") in before
            before += text
            marks += settled
    assert marks > 3


@pytest.mark.parametrize("dataset", MIX)
def test_rows_neither_repeat_facts_nor_show_marks(dataset: str) -> None:
    for row in make_rows(dataset, 3, 1024, 0):
        text = row["context"] + row["input"] + row["answers"][0]
        assert "\x02" not in text and "\x03" not in text
        assert not re.search("As noted before|Once more: |To recall|如前所述|再说一遍|前面提到", text)


def test_one_lesson_in_ten_stops_after_its_first_question(encode: Encoder) -> None:
    asked = [lesson("narrativeqa", 600, str(number), encode)[0].count(EOS) for number in range(200)]
    assert 8 <= asked.count(1) <= 35
    assert max(asked) >= 6


def test_no_key_of_a_lesson_is_one_of_a_row(monkeypatch: pytest.MonkeyPatch, encode: Encoder) -> None:
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
