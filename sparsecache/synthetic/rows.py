"""A made-up sample of LongBench: rows in the benchmark's own format for each of its 21 datasets.

Every row is drawn from inventories that are far too large to know by heart, in templated prose of our own; no
text of the benchmark is in it. It does not know how rows are predicted or scored.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any

from sparsecache.errors import UsageError
from sparsecache.longbench.tasks import load_tasks
from sparsecache.synthetic import chinese, english, fewshot, passages, programs, summaries
from sparsecache.synthetic.build import Draft, Rng, estimate_tokens, unmarked

FEWEST_TOKENS = 256
MOST_TOKENS = 32768

_MAKERS: dict[str, Callable[..., Draft]] = {
    "narrativeqa": english.narrativeqa,
    "qasper": english.qasper,
    "multifieldqa_en": english.multifieldqa_en,
    "multifieldqa_zh": chinese.multifieldqa_zh,
    "hotpotqa": english.hotpotqa,
    "2wikimqa": english.two_wiki,
    "musique": english.musique,
    "dureader": chinese.dureader,
    "gov_report": summaries.gov_report,
    "qmsum": summaries.qmsum,
    "multi_news": summaries.multi_news,
    "vcsum": chinese.vcsum,
    "trec": fewshot.trec,
    "triviaqa": fewshot.triviaqa,
    "samsum": fewshot.samsum,
    "lsht": chinese.lsht,
    "passage_count": passages.passage_count,
    "passage_retrieval_en": passages.passage_retrieval_en,
    "passage_retrieval_zh": chinese.passage_retrieval_zh,
    "lcc": programs.lcc,
    "repobench-p": programs.repobench,
}


def make_rows(dataset: str, rows: int, tokens: int, seed: int) -> list[dict[str, Any]]:
    """`rows` rows of the sample's version of `dataset`, with LongBench's keys in LongBench's order.

    `tokens` (256 to 32768) is the wanted length of the filled prompt by `estimate_tokens`, one token per 4
    ASCII characters and one for every other character; the prompt comes within 15 % of it. Tokenizers differ: a small
    vocabulary needs more tokens. `length` counts context, input and first answer: words, or characters where
    the language is "zh". The same arguments give the same rows in every process and Python version, and row i
    is the same however many rows are asked for. Raises UsageError for an unknown dataset or a number out of
    range.
    """
    if dataset not in _MAKERS:
        raise UsageError(f"There is no sample of a dataset {dataset!r}. Datasets: {', '.join(_MAKERS)}.")
    if not FEWEST_TOKENS <= tokens <= MOST_TOKENS:
        raise UsageError(f"A sample prompt has {FEWEST_TOKENS} to {MOST_TOKENS} tokens, not {tokens}.")
    if rows < 0:
        raise UsageError(f"The number of sample rows is {rows}; it must be 0 or more.")
    task = load_tasks()[dataset]
    language = "python" if task.language == "code" else task.language
    return [_make_row(dataset, language, tokens, f"{dataset}/{seed}/{tokens}/{index}") for index in range(rows)]


def make_draft(dataset: str, rng: Rng, tokens: float, repeats: float = 0.0) -> Draft:
    """What a row of `dataset` is made of, its filled prompt of about `tokens` estimated tokens.

    With `repeats` above 0 (only for prose about facts and for retrieval), a fact is followed, with that chance,
    by an earlier one that is said again, its value marked; a retrieved paragraph by its own heading.
    """
    room = tokens - estimate_tokens(load_template(dataset).format(context="", input=""))
    return _MAKERS[dataset](rng, room, repeats) if repeats else _MAKERS[dataset](rng, room)


@cache
def load_template(dataset: str) -> str:
    """The official template of a dataset."""
    return load_tasks()[dataset].template


def _make_row(dataset: str, language: str, tokens: int, key: str) -> dict[str, Any]:
    draft = make_draft(dataset, Rng(key), tokens)
    context, query = unmarked(draft.context), unmarked(draft.input)
    texts = (context, query, draft.answers[0])
    return {
        "input": query,
        "context": context,
        "answers": draft.answers,
        "length": sum(len(text) if language == "zh" else len(text.split()) for text in texts),
        "dataset": dataset,
        "language": language,
        "all_classes": draft.all_classes,
        "_id": hashlib.sha256(key.encode()).hexdigest()[:48],
    }
