"""The official metrics of LongBench: one function each, named in configs/datasets.toml.

Every public function of this module is a metric, `metric(prediction, answer, context) -> float` in 0 to 1. What one
cannot score it raises on; the caller decides what that is worth. The behaviour is the reference scorer's
(https://github.com/THUDM/LongBench), which published tables were made with, where it is odd too.
"""

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

from sparsecache.longbench import rouge
from sparsecache.longbench.text import chinese_words, jieba_cut, normalized_words

EDIT_BACKENDS = ("difflib", "fuzzywuzzy")
# Python's usual recursion limit, less the frames of `rouge` around its recursion: what remains for the caller's and one
# for each step. (Python 3.11 and before, which count comparisons in C as well, may stop a step earlier.)
_ROUGE_FRAMES = 1000 - 7


@dataclass
class Context:
    """What a metric may know beside the two texts, and where it leaves remarks.

    all_classes: the dataset's class names, for classification.
    edit_backend: `difflib` (published tables), or `fuzzywuzzy`: the package's own `ratio`, which uses
        python-Levenshtein where that is installed.
    official_recursion: give 0.0 where the reference scorer runs into Python's recursion limit.
    too_deep: set to True by a metric when the reference scorer would have run into that limit.
    """

    all_classes: Sequence[str] | None = None
    edit_backend: str = EDIT_BACKENDS[0]
    official_recursion: bool = False
    too_deep: bool = field(default=False, init=False)


def token_f1(prediction: str, answer: str, context: Context) -> float:
    """F1 over the words of both texts: lower case, no punctuation, no articles (SQuAD's)."""
    return _f1(normalized_words(prediction), normalized_words(answer))


def jieba_f1(prediction: str, answer: str, context: Context) -> float:
    """F1 over jieba's words of both texts: lower case, no Chinese or Western punctuation."""
    return _f1(chinese_words(prediction), chinese_words(answer))


def rouge_l(prediction: str, answer: str, context: Context) -> float:
    """F value of summary-level ROUGE-L as the package `rouge` computes it, which published tables use.

    Raises ValueError where that package does: a text without a sentence ("", "." and the like).
    """
    return _rouge_l(prediction, answer, context, official_frames=3)


def jieba_rouge_l(prediction: str, answer: str, context: Context) -> float:
    """`rouge_l` over jieba's words."""
    return _rouge_l(" ".join(jieba_cut(prediction)), " ".join(jieba_cut(answer)), context, official_frames=4)


def classification(prediction: str, answer: str, context: Context) -> float:
    """1 over the number of class names found in the prediction, if the answer is among them; else 0."""
    if context.all_classes is None:
        raise ValueError("classification needs all_classes.")
    found = [name for name in context.all_classes if name in prediction]
    # The reference removes items of the list that it is walking, so the item after a removed one is never
    # looked at. Published scores contain that, so this walks by index just the same.
    index = 0
    while index < len(found):
        if found[index] in answer and found[index] != answer:
            found.remove(found[index])
        index += 1
    return 1.0 / len(found) if answer in found else 0.0


def retrieval(prediction: str, answer: str, context: Context) -> float:
    """Share of the prediction's numbers that are the answer's paragraph number ("Paragraph 7")."""
    return _share_of_numbers(prediction, re.findall(r"Paragraph (\d+)", answer)[0])


def retrieval_zh(prediction: str, answer: str, context: Context) -> float:
    """Share of the prediction's numbers that are the answer's paragraph number ("段落7")."""
    return _share_of_numbers(prediction, re.findall(r"段落(\d+)", answer)[0])


def count(prediction: str, answer: str, context: Context) -> float:
    """Share of the prediction's numbers that are the answer."""
    return _share_of_numbers(prediction, str(answer))


def edit_similarity(prediction: str, answer: str, context: Context) -> float:
    """Similarity ratio of the answer and the prediction's first line that holds no `, # or //."""
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not ("`" in line or "#" in line or "//" in line)), "")
    ratio = _fuzzywuzzy_ratio() if context.edit_backend == "fuzzywuzzy" else _difflib_ratio
    return ratio(code, answer) / 100


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
    """What `fuzzywuzzy.fuzz.ratio` gives without python-Levenshtein: 0 to 100, whatever is installed."""
    if first == second:
        return 100
    if not first or not second:
        return 0
    return round(100 * difflib.SequenceMatcher(None, first, second).ratio())


@cache
def _fuzzywuzzy_ratio() -> Callable[[str, str], int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its advice to install python-Levenshtein
        from fuzzywuzzy import fuzz
    ratio: Callable[[str, str], int] = fuzz.ratio
    return ratio


def _rouge_l(prediction: str, answer: str, context: Context, official_frames: int) -> float:
    """ROUGE-L, and whether the reference scorer, which stands `official_frames` deep, runs out of frames."""
    score, too_deep = rouge.rouge_l(prediction, answer, _ROUGE_FRAMES - official_frames)
    context.too_deep |= too_deep
    return 0.0 if too_deep and context.official_recursion else score
