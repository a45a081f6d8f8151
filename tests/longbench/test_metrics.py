"""Every metric against the library that defines it, or against a copy of the reference's formula.

In one file because the metrics are one module, with one test or two each.
"""

import functools
import json
import re
import string
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import jieba
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge import Rouge

from longbench_eval import score as eval_command
from sparsecache.longbench import metrics
from sparsecache.longbench.metrics import Context

RunPython = Callable[..., CompletedProcess[str]]
WORDS = st.lists(st.sampled_from("the The a an cat Cat. sat, on. mat don't an-a the'".split()), max_size=12).map(
    " ".join
)
CHINESE = st.text(st.sampled_from("北京大学生前来应聘，。！、的 Ab1.—「」"), max_size=20)


def f1(prediction: list[str], answer: list[str]) -> float:
    same = sum((Counter(prediction) & Counter(answer)).values())
    if same == 0:
        return 0
    precision, recall = 1.0 * same / len(prediction), 1.0 * same / len(answer)
    return (2 * precision * recall) / (precision + recall)


def squad_words(text: str) -> list[str]:
    """Normalize text as SQuAD's evaluation script does."""
    text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()).split()


@given(WORDS | st.text(max_size=30), WORDS | st.text(max_size=30))
def test_token_f1(prediction: str, answer: str) -> None:
    expected = f1(squad_words(prediction), squad_words(answer))
    assert metrics.token_f1(prediction, answer, Context()) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("The Cat!", "a cat", 1.0),
        ("cat sat", "cat", 2 / 3),
        ("cat cat", "cat", 2 / 3),
        ("the", "the", 0.0),
        ("", "cat", 0.0),
        ("don't", "dont", 1.0),
    ],
)
def test_token_f1_by_hand(prediction: str, answer: str, score: float) -> None:
    assert metrics.token_f1(prediction, answer, Context()) == pytest.approx(score, abs=0)


def bare_chinese_words(text: str) -> list[str]:
    punctuation = set(string.punctuation) | set(
        "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」"
    )
    punctuation |= set("『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏")
    words = []
    for word in jieba.cut(text, cut_all=False):
        bare = "".join(ch for ch in word.lower() if ch not in punctuation)
        words.append("".join(bare.split()))
    return [word for word in words if len(word) > 0]


@given(CHINESE, CHINESE)
def test_jieba_f1(prediction: str, answer: str) -> None:
    expected = f1(bare_chinese_words(prediction), bare_chinese_words(answer))
    assert metrics.jieba_f1(prediction, answer, Context()) == expected


def test_jieba_f1_by_hand() -> None:
    # 北京 | 大学 against 北京 | 大学 | 生, whatever the punctuation and the spaces.
    assert metrics.jieba_f1("「北京」，大学！", "北京 大学", Context()) == 1.0
    assert metrics.jieba_f1("北京", "北京 大学", Context()) == pytest.approx(2 / 3)


def library_rouge_l(prediction: str, answer: str) -> float:
    score: float = Rouge().get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
    return score


@given(WORDS.filter(lambda text: text.strip(".")), WORDS.filter(lambda text: text.strip(".")))
def test_rouge_l_equals_the_package(prediction: str, answer: str) -> None:
    assert metrics.rouge_l(prediction, answer, Context()) == library_rouge_l(prediction, answer)


@given(CHINESE.filter(lambda text: text.strip(".")), CHINESE.filter(lambda text: text.strip(".")))
def test_jieba_rouge_l_equals_the_package_over_jieba_words(prediction: str, answer: str) -> None:
    expected = library_rouge_l(" ".join(jieba.cut(prediction)), " ".join(jieba.cut(answer)))
    assert metrics.jieba_rouge_l(prediction, answer, Context()) == expected


@pytest.mark.parametrize("metric", [metrics.rouge_l, metrics.jieba_rouge_l])
@pytest.mark.parametrize("text", ["", ".", "..."])
def test_rouge_l_raises_as_the_package_does(metric: Callable[[str, str, Context], float], text: str) -> None:
    with pytest.raises(ValueError, match="Collections must contain"):
        Rouge(["rouge-l"]).get_scores(text, "a cat")
    for pair in ((text, "a cat"), ("a cat", text)):
        with pytest.raises(ValueError, match="needs a sentence in both texts"):
            metric(*pair, Context())


# The reference scorer's shape: module -> scorer() -> metric -> Rouge().get_scores, and a bare except. For each case
# it prints the reference's score, and the score without a limit.
REFERENCE = """
import json, sys
import jieba
from rouge import Rouge

def rouge_score(prediction, ground_truth, **kwargs):
    rouge = Rouge()
    try:
        scores = rouge.get_scores([prediction], [ground_truth], avg=True)
    except:
        return 0.0
    return scores["rouge-l"]["f"]

def rouge_zh_score(prediction, ground_truth, **kwargs):
    prediction = " ".join(list(jieba.cut(prediction, cut_all=False)))
    ground_truth = " ".join(list(jieba.cut(ground_truth, cut_all=False)))
    score = rouge_score(prediction, ground_truth)
    return score

def scorer(name, prediction, answer):
    metric = {"rouge_l": rouge_score, "jieba_rouge_l": rouge_zh_score}[name]
    score = 0.
    score = max(score, metric(prediction, answer, all_classes=None))
    return score

results = []
for case in json.load(open(sys.argv[1])):
    official = scorer(*case)
    sys.setrecursionlimit(100_000)
    results.append([official, scorer(*case) if official == 0 else official])
    sys.setrecursionlimit(1000)
print(json.dumps(results))
"""

Case = tuple[str, str, str]
CASES: list[Case] = [
    *(
        # The package's backtrace walks from an answer's end to its first word: as many steps, and a small table.
        (metric, "w0", " ".join(f"w{word}" for word in range(depth)))
        for metric in ("rouge_l", "jieba_rouge_l")
        for depth in range(986, 996)
    ),
    ("rouge_l", *2 * (" ".join(f"w{word}" for word in range(1001)),)),
    ("rouge_l", "w0. w1 w2", "w0 " * 1500 + ". w2 w1"),
    ("rouge_l", " ".join(f"w{word}" for word in range(1500)), "w0"),
    ("jieba_rouge_l", "北京", "北京" * 1200),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, run_python: RunPython) -> list[tuple[float, float]]:
    """Return the reference scorer's results for CASES, with and without its recursion limit."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "eval.py").write_text(REFERENCE)
    (folder / "cases.json").write_text(json.dumps(CASES))
    done = run_python(folder / "eval.py", folder / "cases.json")
    assert done.returncode == 0, done.stderr
    return [(official, true) for official, true in json.loads(done.stdout)]


def score(case: Case, official_recursion: bool = False) -> tuple[float, bool]:
    name, prediction, answer = case
    context = Context(official_recursion=official_recursion)
    value: float = getattr(metrics, name)(prediction, answer, context)
    return value, context.recursion_exceeded


def deep(frames: int, work: Callable[[], object]) -> object:
    return work() if frames == 0 else deep(frames - 1, work)


def deep_in_calls_from_c(frames: int, work: Callable[[], object]) -> object:
    if frames == 0:
        return work()
    return functools.reduce(lambda _, left: deep_in_calls_from_c(left, work), [frames - 1], None)


def test_deep_texts_get_their_true_score_and_a_flag(reference: list[tuple[float, float]]) -> None:
    limit = sys.getrecursionlimit()
    assert {official == 0 for official, _ in reference} == {True, False}
    assert all(true > 0 for _, true in reference)
    assert [score(case) for case in CASES] == [(true, official == 0) for official, true in reference]
    assert sys.getrecursionlimit() == limit


@pytest.mark.parametrize("go", [lambda work: work(), lambda work: deep(800, work)], ids=["here", "800 deep"])
def test_official_recursion_gives_zero_as_the_reference_does(
    reference: list[tuple[float, float]], go: Callable[[Callable[[], object]], object]
) -> None:
    expected = [(official, official == 0) for official, _ in reference]
    assert go(lambda: [score(case, official_recursion=True) for case in CASES]) == expected


@pytest.mark.parametrize("caller", [deep, deep_in_calls_from_c])
def test_the_stack_depth_of_the_caller_changes_nothing(
    reference: list[tuple[float, float]], caller: Callable[..., object]
) -> None:
    frames = 800 if caller is deep else 150
    cheap = [at for at, case in enumerate(CASES) if len(case[1]) < 10]
    limit = sys.getrecursionlimit()
    found = caller(frames, lambda: [score(CASES[at]) for at in cheap])
    assert found == [(reference[at][1], reference[at][0] == 0) for at in cheap]
    assert sys.getrecursionlimit() == limit


@given(st.lists(st.sampled_from(["ab", "b", "abc", "c", "bc", "ab"]), max_size=6), st.text("abc ", max_size=12))
def test_classification_removes_while_iterating(classes: list[str], prediction: str) -> None:
    for answer in ("ab", "abc", "b"):
        matches = [name for name in classes if name in prediction]
        for match in matches:
            if match in answer and match != answer:
                matches.remove(match)
        expected = 1.0 / len(matches) if answer in matches else 0.0
        assert metrics.classification(prediction, answer, Context(classes)) == expected


def test_classification_by_hand() -> None:
    # "b" and "c" are both parts of the answer; with "b" removed, "c" is passed over and stays.
    assert metrics.classification("abc", "abc", Context(["b", "c", "abc"])) == 1 / 2
    assert metrics.classification("abc", "abc", Context(["abc", "x", "b"])) == 1.0
    assert metrics.classification("x", "abc", Context(["abc", "x"])) == 0.0
    with pytest.raises(ValueError, match="needs all_classes"):
        metrics.classification("x", "x", Context())


@pytest.mark.parametrize(
    ("prediction", "value"),
    [("Paragraph 7", 1.0), ("7 or 17", 1 / 2), ("77", 0.0), ("07", 0.0), ("seven", 0.0), ("", 0.0), ("7 7 1 2", 1 / 2)],
)
def test_number_metrics(prediction: str, value: float) -> None:
    assert metrics.retrieval(prediction, "Paragraph 7", Context()) == value
    assert metrics.retrieval_zh(prediction, "段落7", Context()) == value
    assert metrics.count(prediction, "7", Context()) == value


@pytest.mark.parametrize("metric", [metrics.retrieval, metrics.retrieval_zh])
def test_an_answer_without_a_paragraph_raises(metric: Callable[[str, str, Context], float]) -> None:
    with pytest.raises(IndexError):
        metric("1", "7", Context())


@pytest.mark.parametrize(
    ("prediction", "compared"),
    [
        ("\n\n```python\n# say\nx = 1\ny = 2", "x = 1"),
        ("x = 1 // 2\ny = 2", "y = 2"),
        ("x = 1  # one", ""),
        ("    x = 1\n", "    x = 1"),
        (" \nx = 1", " "),
        ("", ""),
    ],
)
def test_edit_similarity_compares_one_line(prediction: str, compared: str) -> None:
    assert metrics.edit_similarity(prediction, compared, Context()) == 1.0
    assert metrics.edit_similarity(prediction, compared + "?", Context()) < 1.0


# Runs in an interpreter where python-Levenshtein cannot be imported: fuzzywuzzy's ratio is difflib's there.
AGAINST_FUZZYWUZZY = """
import sys, warnings
sys.modules["Levenshtein"] = None
warnings.simplefilter("ignore")
from fuzzywuzzy import fuzz
from hypothesis import given, settings, strategies as st
from sparsecache.longbench.metrics import Context, edit_similarity
assert fuzz.SequenceMatcher.__module__ == "difflib"
seen = set()

@settings(max_examples=300, deadline=None, database=None)
@given(*[st.text("abc (x)=1é中", max_size=40) | st.text(st.characters(exclude_characters="`#/\\n"), max_size=300)] * 2)
def compare(prediction, answer):
    expected = fuzz.ratio(prediction, answer)
    seen.add(expected)
    for backend in ("difflib", "fuzzywuzzy"):
        assert edit_similarity(prediction, answer, Context(edit_backend=backend)) == expected / 100

compare()
text = "    return self.cache[key] if key in self.cache else default " * 6  # over 200: difflib's junk heuristic
assert edit_similarity(text, text[::-1], Context()) == fuzz.ratio(text, text[::-1]) / 100 < 1
assert len(seen) > 10
print("compared")
"""


def test_edit_similarity_equals_fuzzywuzzy_without_levenshtein(run_python: RunPython) -> None:
    done = run_python("-c", AGAINST_FUZZYWUZZY)
    assert done.stdout == "compared\n", done.stderr


def test_an_installed_levenshtein_changes_only_the_fuzzywuzzy_backend(tmp_path: Path, run_python: RunPython) -> None:
    (tmp_path / "Levenshtein.py").write_text("def ratio(first, second):\n    return 0.77\n")
    code = (
        "from sparsecache.longbench.metrics import Context, edit_similarity as edit\n"
        "print(*[edit('x = 1', 'x = 2', Context(edit_backend=name)) for name in ('difflib', 'fuzzywuzzy')])\n"
        "import sys; print('Levenshtein' in sys.modules)"
    )
    assert run_python("-c", code, path=(tmp_path,)).stdout == "0.8 0.77\nTrue\n"
    (tmp_path / "Levenshtein.py").write_text("raise ImportError\n")
    assert run_python("-c", code, path=(tmp_path,)).stdout == "0.8 0.8\nFalse\n"


def test_the_command_line_offers_every_edit_backend() -> None:
    option = next(option for option in eval_command.params if option.name == "edit_backend")
    assert tuple(option.type.choices) == metrics.EDIT_BACKENDS  # type: ignore[attr-defined]
    assert option.default == Context().edit_backend == "difflib"
