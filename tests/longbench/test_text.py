"""Detection of degenerate texts."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecache.longbench.tasks import select_tasks
from sparsecache.longbench.text import is_degenerate
from sparsecache.synthetic.rows import make_rows

GARBLED = {
    "one word": "the the the the the the the the",
    "one letter": "a" * 30,
    "one line": "I am not sure about this.\n" * 6,
    "one Chinese phrase": "我不知道。" * 8,
    "after a good start": "The answer is that " + "Paris and " * 20,
    "symbols": "!!?? ;; --- ## ,,, ... ((( )))",
    "digits": "31 41 59 26 53 58 97 93 23 84 62",
    "replacement characters": "ab" + 18 * "\ufffd",
    "line breaks between": "x\n\n" * 20,
}
FINE = {
    "empty": "",
    "short": "no no no no no",
    "a number": "1234567890123456789",
    "an English sentence": "He was appointed governor in 1871, and again, and again, until he died in 1890.",
    "a Chinese sentence": "会议讨论了年轻人的消费方式和模式，互联网的力量将会成为普世的现象。",
    "code": "            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)",
    "a little repetition": "Well, well, well, well, I did not expect you here today, my old friend from school.",
    "a list": "\n".join(f"* item {name}: done" for name in ("one", "seven", "mango", "Oslo", "blue")),
    "spaces": " " * 200 + "The answer is Paris, of course.",
}


@pytest.mark.parametrize("text", GARBLED.values(), ids=GARBLED)
def test_degenerate_texts(text: str) -> None:
    assert is_degenerate(text)


@pytest.mark.parametrize("text", FINE.values(), ids=FINE)
def test_normal_texts(text: str) -> None:
    assert not is_degenerate(text)


@pytest.mark.parametrize("name", [task.name for task in select_tasks("all")])
def test_answers_of_the_sample_are_not_degenerate(name: str) -> None:
    assert not any(is_degenerate(answer) for row in make_rows(name, 5, 512, 0) for answer in row["answers"])


def test_most_real_predictions_are_not_degenerate(fixtures_dir: Path) -> None:
    texts = [
        json.loads(line)["pred"]
        for path in sorted(fixtures_dir.glob("pred*/*/*.jsonl"))
        for line in path.read_bytes().split(b"\n")
        if line
    ]
    garbled = [text for text in texts if is_degenerate(text)]
    assert len(texts) > 500
    assert len(garbled) < len(texts) * 0.05, garbled


@given(st.text(min_size=1, max_size=40), st.integers(20, 60))
def test_any_repeated_piece_is_degenerate(piece: str, times: int) -> None:
    text = (piece * times).strip()
    assert is_degenerate(text) == (len(" ".join(text.split())) >= 20)


@given(st.text(max_size=19))
def test_short_texts_are_not_degenerate(text: str) -> None:
    assert not is_degenerate(text)


def test_the_limits_of_both_rules() -> None:
    letters = "abcdefghijkl"
    assert not is_degenerate(letters + "xyxyxyxyxyxy")  # just half of it
    assert is_degenerate(letters[:-1] + "xyxyxyxyxyxy")
    piece = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLM"
    assert len(piece) == 40
    assert is_degenerate(piece * 4)
    assert not is_degenerate(piece * 3)
    assert not is_degenerate((piece + "!") * 4)
    digits = "0918273645546372819092736455463728190172838"
    assert not is_degenerate(letters[:10] + digits[:40])  # one in five is a letter
    assert is_degenerate(letters[:9] + digits[:41])
