"""Splits text into the words that the metrics compare, and detects degenerate text."""

import re
import string
import unicodedata
import warnings
from functools import cache
from typing import Any

_PUNCTUATION = frozenset(string.punctuation)
_ALL_PUNCTUATION = _PUNCTUATION | frozenset(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_REPEATED = re.compile(r"(.{1,40}?)\1{3,}", re.DOTALL)


def normalized_words(text: str) -> list[str]:
    """Return lower-case words without ASCII punctuation and without the articles a, an, the."""
    bare = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def chinese_words(text: str) -> list[str]:
    """Return jieba's lower-case words without Chinese or ASCII punctuation and white space."""
    kept = (
        "".join(character for character in word.lower() if character not in _ALL_PUNCTUATION)
        for word in jieba_cut(text)
    )
    return [word for word in ("".join(part.split()) for part in kept) if word]


def jieba_cut(text: str) -> list[str]:
    """Return jieba's words in precise mode, including white space and punctuation."""
    return list(_tokenizer().cut(text, cut_all=False))


def choice_letter(text: str) -> str | None:
    """Return the letter A to D that follows "The correct answer is", as LongBench v2 finds it; None without one.

    A letter in parentheses precedes one without. Asterisks are ignored.
    """
    text = text.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(r"The correct answer is ([A-D])", text)
    return found[1] if found else None


def is_degenerate(text: str) -> bool:
    """Return whether 20 characters or more are mostly repetitions, or mostly symbols and digits.

    Repetitions: more than half of the text consists of pieces of up to 40 characters that repeat four times or more in
    a row. Symbols: fewer than one in five characters is a letter. White space counts as one space.
    """
    squeezed = " ".join(text.split())
    if len(squeezed) < 20:
        return False
    letters = sum(unicodedata.category(character)[0] == "L" for character in squeezed)
    repeated = sum(match.end() - match.start() for match in _REPEATED.finditer(squeezed))
    return letters < len(squeezed) / 5 or repeated > len(squeezed) / 2


@cache
def _tokenizer() -> Any:
    """Return a jieba tokenizer with the installed dictionary, built in about a second.

    jieba itself reads `jieba.cache` from the temporary folder, where any user can place another dictionary, and its
    global tokenizer may hold user words. Both change scores.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba uses pkg_resources and unescaped patterns
        import jieba
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer
