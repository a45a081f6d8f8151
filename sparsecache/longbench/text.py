"""Words of a text as the metrics count them, and whether a text is garbled. Knows nothing of rows or scores."""

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
    """Lower-case words without ASCII punctuation and without the articles a, an, the."""
    bare = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def chinese_words(text: str) -> list[str]:
    """jieba's words in lower case, without Chinese or ASCII punctuation and without white space."""
    kept = (
        "".join(character for character in word.lower() if character not in _ALL_PUNCTUATION)
        for word in jieba_cut(text)
    )
    return [word for word in ("".join(part.split()) for part in kept) if word]


def jieba_cut(text: str) -> list[str]:
    """jieba's words in precise mode, white space and punctuation included."""
    return list(_tokenizer().cut(text, cut_all=False))


def degenerate(text: str) -> bool:
    """Whether a text of 20 characters or more is mostly one repeated piece, or symbols and digits.

    Repeated: more than half of it lies in runs of a piece of up to 40 characters, four times or more in a row.
    Symbols: fewer than one in five characters is a letter. White space counts as one space.
    """
    squeezed = " ".join(text.split())
    if len(squeezed) < 20:
        return False
    letters = sum(unicodedata.category(character)[0] == "L" for character in squeezed)
    repeated = sum(match.end() - match.start() for match in _REPEATED.finditer(squeezed))
    return letters < len(squeezed) / 5 or repeated > len(squeezed) / 2


@cache
def _tokenizer() -> Any:
    """A jieba tokenizer with the dictionary of the installed package, built in this process (about a second).

    jieba's own start reads `jieba.cache` from the temporary folder, where any user may have put another dictionary,
    and its global tokenizer may have been given user words; both change scores.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its use of pkg_resources and unescaped patterns
        import jieba
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer
