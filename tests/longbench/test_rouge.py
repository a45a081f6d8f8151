"""ROUGE-L against the package `rouge`: equal floats and equal recursion depth."""

import json
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

import jieba
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge import Rouge

from sparsecache.longbench.metrics import Context, jieba_rouge_l
from sparsecache.longbench.rouge import common_length, rouge_l

RunPython = Callable[..., CompletedProcess[str]]
PACKAGE = Rouge(["rouge-l"])

# Few words, so that most traces have ties.
PIECES = st.sampled_from([*"abc", *"abc", "the", ".", ". ", " . ", "a.b", "..", "\n", "\u3000", "\x85", "\x1f", "é"])
TEXTS = (
    st.lists(PIECES, max_size=60).map(" ".join)
    | st.lists(st.sampled_from("ab"), max_size=80).map(" ".join)
    | st.lists(PIECES, max_size=12).map("".join)
    | st.text(max_size=40)
)
CHINESE = st.text("北京大学生前来应聘，。的的 .\nA1", max_size=40)


def package(prediction: str, answer: str) -> float | None:
    """Return the package's score; None if it raises ValueError. Texts must be short, since it recurses."""
    try:
        score: float = PACKAGE.get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
    except ValueError:
        return None
    return score


def ours(prediction: str, answer: str) -> float | None:
    try:
        return rouge_l(prediction, answer, 990)[0]
    except ValueError:
        return None


@settings(max_examples=500)
@given(TEXTS, TEXTS, st.sampled_from([1, 2, 7, 512]), st.sampled_from([2, 3, 64]), st.sampled_from([0, 20, 2**20]))
@example("", "", 512, 64, 0)
@example(" ", " ", 512, 64, 0)
@example("...", "a", 512, 64, 0)
@example("a . . b", "b. .a", 512, 64, 0)
@example("a", "a", 1, 2, 0)
@example(" ".join("ab" * 40), " ".join("ba" * 40), 1, 2, 0)
def test_scores_equal_the_package(prediction: str, answer: str, kept: int, parts: int, cached: int) -> None:
    sizes = {"_ROWS_KEPT": kept, "_PARTS": parts, "_CACHED_BYTES": cached}
    with patch.multiple("sparsecache.longbench.rouge", **sizes):
        assert ours(prediction, answer) == package(prediction, answer)


@given(CHINESE, CHINESE)
def test_scores_over_jieba_words_equal_the_package(prediction: str, answer: str) -> None:
    expected = package(" ".join(jieba.cut(prediction)), " ".join(jieba.cut(answer)))
    try:
        assert jieba_rouge_l(prediction, answer, Context()) == expected
    except ValueError:
        assert expected is None


@pytest.mark.parametrize(("prediction", "answer"), [("", "a"), ("a", ""), (".", "a"), ("a", "..."), ("", ".")])
def test_a_text_without_a_sentence_is_refused(prediction: str, answer: str) -> None:
    assert package(prediction, answer) is None
    with pytest.raises(ValueError, match="needs a sentence in both texts"):
        rouge_l(prediction, answer, 990)


def test_scores_of_real_predictions_equal_the_package(fixtures_dir: Path) -> None:
    pairs = [
        tuple(" ".join(jieba.cut(text)) if name in ("vcsum", "dureader") else text for text in (row["pred"], answer))
        for name in ("gov_report", "qmsum", "multi_news", "samsum", "vcsum", "dureader")
        for path in fixtures_dir.glob(f"pred*/*/{name}.jsonl")
        for row in map(json.loads, path.read_bytes().rstrip(b"\n").split(b"\n"))
        for answer in row["answers"]
    ]
    assert len(pairs) > 180
    assert [ours(*pair) for pair in pairs] == [package(*pair) for pair in pairs]


# For many texts: the smallest `max_steps` that `rouge_l` accepts is enough for the package, and one less is not. The
# other nine frames: this module, `fits`, six of the package, and the call that ends the recursion.
AGAINST_A_REAL_LIMIT = """
import bisect, random, sys
from rouge import Rouge
from sparsecache.longbench.rouge import common_length, rouge_l

package = Rouge(["rouge-l"])
pick = random.Random(7)

def fits(prediction, answer, steps):
    sys.setrecursionlimit(steps + 9)
    try:
        package.get_scores([prediction], [answer], avg=True)
    except RecursionError:
        return False
    finally:
        sys.setrecursionlimit(1000)
    return True

def text(longest):
    words = "abcdef"[: pick.randint(1, 6)] + "." * pick.randint(0, 1)
    return "x " + " ".join(pick.choices(words, k=pick.randint(0, pick.choice([5, longest]))))

seen = set()
for trial in range(400):
    prediction, answer = text(90), text(90)
    steps = bisect.bisect(range(181), -1, key=lambda most: -rouge_l(prediction, answer, most)[1])
    if steps > 8:  # else there is no room for the package's other calls
        seen.add(steps)
        assert fits(prediction, answer, steps) and not fits(prediction, answer, steps - 1), (prediction, answer, steps)
print(len(seen))
"""


def test_the_number_of_steps_equals_the_recursion_depth_of_the_package(run_python: RunPython) -> None:
    done = run_python("-c", AGAINST_A_REAL_LIMIT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 60


@given(TEXTS.filter(lambda text: text.strip(".")), TEXTS.filter(lambda text: text.strip(".")), st.integers(0, 40))
def test_the_score_does_not_depend_on_max_steps(prediction: str, answer: str, most: int) -> None:
    scores = [rouge_l(prediction, answer, steps) for steps in (most, most + 1, 990)]
    assert len({score for score, _ in scores}) == 1
    assert [recursion_exceeded for _, recursion_exceeded in scores] == sorted(
        (recursion_exceeded for _, recursion_exceeded in scores), reverse=True
    )


@pytest.mark.parametrize(
    "join",
    [" ".join, ". ".join, lambda words: " ".join(f"{word}." * (at % 15 == 0) or word for at, word in enumerate(words))],
    ids=["one sentence", "a word each", "15 words each"],
)
@pytest.mark.parametrize("vocabulary", [8, 20_000])
def test_long_texts_take_seconds_and_little_memory(join: Callable[[list[str]], str], vocabulary: int) -> None:
    pick = random.Random(1)
    prediction, answer = (
        join([chr(0x4E00 + pick.randrange(vocabulary)) for _ in range(25_000)])[:50_000] for _ in range(2)
    )
    start = time.process_time()
    tracemalloc.start()
    try:
        score, _ = rouge_l(prediction, answer, 990)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0 < score < 1
    assert time.process_time() - start < 30
    assert peak < 200e6


# Bits for every distinct word would take 450 MB for 60,000 words, every row of the table 18 MB for 12,000.
@pytest.mark.parametrize(
    ("prediction", "answer", "cached", "limit"),
    [(60_000, 60, 2**25, 150e6), (60, 60_000, 2**25, 150e6), (12_000, 12_000, 2**18, 12e6)],
)
def test_memory_is_linear_in_distinct_words(prediction: int, answer: int, cached: int, limit: float) -> None:
    texts = [" ".join(f"w{number}" for number in range(count)) for count in (prediction, answer)]
    start = time.process_time()
    tracemalloc.start()
    try:
        with patch("sparsecache.longbench.rouge._CACHED_BYTES", cached):
            score, _ = rouge_l(texts[0], texts[1], 990)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    precision, recall = (min(prediction, answer) / count for count in (prediction, answer))
    assert score == 2.0 * ((precision * recall) / (precision + recall + 1e-8))
    assert peak < limit
    assert time.process_time() - start < 60


@given(st.lists(st.sampled_from("abcd"), max_size=30), st.lists(st.sampled_from("abcd"), max_size=30))
def test_common_length_equals_the_textbook_algorithm(first: list[str], second: list[str]) -> None:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, mine in enumerate(first):
        for j, theirs in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if mine == theirs else max(table[i][j + 1], table[i + 1][j])
    assert common_length(first, second) == table[-1][-1]
