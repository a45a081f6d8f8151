"""The official metrics of LongBench and RULER, one function each, as configs/*.toml name them.

Every public function is a metric, `metric(prediction, answer, context) -> float` in 0 to 1. A metric raises on texts
that it cannot score; the caller decides how they count. The behaviour, including its oddities, is that of the reference
scorer (https://github.com/THUDM/LongBench), which produced the published tables.
"""

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

from sparsecache.longbench import rouge
from sparsecache.longbench.text import chinese_words, choice_letter, jieba_cut, normalized_words

MEAN_METRICS = ("string_match_all",)
"""The metrics whose mean over a row's answers is its score; of the others it is the highest."""
_CONTROL = re.compile(r"[\x00-\x1f]")
EDIT_BACKENDS = ("difflib", "fuzzywuzzy")
# Python's default recursion limit, less the frames of `rouge` around its recursion. The rest is for the caller's frames
# and one frame per step. Python 3.11 and earlier also count comparisons in C and may stop one step earlier.
_ROUGE_FRAMES = 1000 - 7


@dataclass
class Context:
    """The inputs of a metric besides the two texts, and a flag that it sets.

    all_classes: the dataset's class names, for classification.
    edit_backend: `difflib` (published tables), or `fuzzywuzzy`: the package's own `ratio`, which uses
        python-Levenshtein if that is installed.
    official_recursion: return 0.0 if the reference scorer would exceed Python's recursion limit.
    recursion_exceeded: set to True by a metric if the reference scorer would exceed that limit.
    """

    all_classes: Sequence[str] | None = None
    edit_backend: str = EDIT_BACKENDS[0]
    official_recursion: bool = False
    recursion_exceeded: bool = field(default=False, init=False)


def token_f1(prediction: str, answer: str, context: Context) -> float:
    """Return F1 over lower-case words without punctuation and articles (as SQuAD)."""
    return _f1(normalized_words(prediction), normalized_words(answer))


def jieba_f1(prediction: str, answer: str, context: Context) -> float:
    """Return F1 over jieba's lower-case words without Chinese and ASCII punctuation."""
    return _f1(chinese_words(prediction), chinese_words(answer))


def rouge_l(prediction: str, answer: str, context: Context) -> float:
    """Return the F value of summary-level ROUGE-L as the package `rouge` computes it.

    Raises ValueError as that package does: for a text without a sentence, such as "" or ".".
    """
    return _rouge_l(prediction, answer, context, official_frames=3)


def jieba_rouge_l(prediction: str, answer: str, context: Context) -> float:
    """Return `rouge_l` over jieba's words."""
    return _rouge_l(" ".join(jieba_cut(prediction)), " ".join(jieba_cut(answer)), context, official_frames=4)


def classification(prediction: str, answer: str, context: Context) -> float:
    """Return 1 / n for n class names in the prediction, if the answer is among them; else 0."""
    if context.all_classes is None:
        raise ValueError("classification needs all_classes.")
    found = [name for name in context.all_classes if name in prediction]
    # The reference removes items from the list that it iterates over, so it skips the item after a removed one.
    # Published scores include this behaviour.
    index = 0
    while index < len(found):
        if found[index] in answer and found[index] != answer:
            found.remove(found[index])
        index += 1
    return 1.0 / len(found) if answer in found else 0.0


def retrieval(prediction: str, answer: str, context: Context) -> float:
    """Return the share of the prediction's numbers that equal the answer's ("Paragraph 7")."""
    return _share_of_numbers(prediction, re.findall(r"Paragraph (\d+)", answer)[0])


def retrieval_zh(prediction: str, answer: str, context: Context) -> float:
    """Return the share of the prediction's numbers that equal the answer's ("段落7")."""
    return _share_of_numbers(prediction, re.findall(r"段落(\d+)", answer)[0])


def count(prediction: str, answer: str, context: Context) -> float:
    """Return the share of the prediction's numbers that equal the answer."""
    return _share_of_numbers(prediction, str(answer))


def edit_similarity(prediction: str, answer: str, context: Context) -> float:
    """Return the similarity of the answer and the prediction's first line without `, # and //."""
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not ("`" in line or "#" in line or "//" in line)), "")
    ratio = _fuzzywuzzy_ratio() if context.edit_backend == "fuzzywuzzy" else _difflib_ratio
    return ratio(code, answer) / 100


def choice(prediction: str, answer: str, context: Context) -> float:
    """Return 1 if the letter that the prediction gives as its answer is the answer (LongBench v2)."""
    return float(choice_letter(prediction) == answer)


def string_match_part(prediction: str, answer: str, context: Context) -> float:
    """Return 1 if the prediction contains the answer in any case (RULER)."""
    return float(answer.lower() in _CONTROL.sub("\n", prediction.strip()).strip().lower())


def string_match_all(prediction: str, answer: str, context: Context) -> float:
    """Return `string_match_part`; a row's score is the share of its answers that are found (RULER)."""
    return string_match_part(prediction, answer, context)


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    common = sum((Counter(prediction) & Counter(answer)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return (2 * precision * recall) / (precision + recall)


def _share_of_numbers(prediction: str, answer: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return sum(number == answer for number in numbers) / len(numbers) if numbers else 0.0


def _difflib_ratio(first: str, second: str) -> int:
    """Return `fuzzywuzzy.fuzz.ratio` as computed without python-Levenshtein, 0 to 100."""
    if first == second:
        return 100
    if not first or not second:
        return 0
    return round(100 * difflib.SequenceMatcher(None, first, second).ratio())


@cache
def _fuzzywuzzy_ratio() -> Callable[[str, str], int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises to install python-Levenshtein
        from fuzzywuzzy import fuzz
    ratio: Callable[[str, str], int] = fuzz.ratio
    return ratio


def _rouge_l(prediction: str, answer: str, context: Context, official_frames: int) -> float:
    """Return ROUGE-L, and set `recursion_exceeded`.

    `official_frames`: stack depth of the reference scorer.
    """
    score, recursion_exceeded = rouge.rouge_l(prediction, answer, _ROUGE_FRAMES - official_frames)
    context.recursion_exceeded |= recursion_exceeded
    return 0.0 if recursion_exceeded and context.official_recursion else score
