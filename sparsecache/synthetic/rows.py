"""Synthetic rows in LongBench's format for each of its 21 datasets.

Contexts are templated prose and code; names and values come from large inventories, so that answers cannot be
memorized. No text of the benchmark is used. This module is independent of prediction and scoring.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any

from sparsecache.errors import UsageError
from sparsecache.longbench.tasks import load_tasks
from sparsecache.synthetic import chinese, code, english, few_shot, passages, summaries
from sparsecache.synthetic.draft import Draft, Rng, estimate_tokens, strip_marks

MIN_TOKENS = 256
MAX_TOKENS = 32768

_GENERATORS: dict[str, Callable[..., Draft]] = {
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
    "trec": few_shot.trec,
    "triviaqa": few_shot.triviaqa,
    "samsum": few_shot.samsum,
    "lsht": chinese.lsht,
    "passage_count": passages.passage_count,
    "passage_retrieval_en": passages.passage_retrieval_en,
    "passage_retrieval_zh": chinese.passage_retrieval_zh,
    "lcc": code.lcc,
    "repobench-p": code.repobench,
}


def make_rows(dataset: str, rows: int, tokens: int, seed: int) -> list[dict[str, Any]]:
    """Generate `rows` synthetic rows of `dataset`, with LongBench's keys in LongBench's order.

    `tokens` (256 to 32768) is the target length of the filled prompt by `estimate_tokens`; the prompt is within 15 % of
    it. Real tokenizers differ: a small vocabulary needs more tokens. `length` counts the words of context, input and
    first answer (characters if the language is "zh"). Rows depend only on the arguments, not on the process or the
    Python version, and row i does not depend on `rows`.

    Raises UsageError for an unknown dataset or a number out of range.
    """
    if dataset not in _GENERATORS:
        raise UsageError(f"There are no synthetic rows of dataset {dataset!r}. Datasets: {', '.join(_GENERATORS)}.")
    if not MIN_TOKENS <= tokens <= MAX_TOKENS:
        raise UsageError(f"The length of sample prompts is {tokens} tokens; it must be {MIN_TOKENS} to {MAX_TOKENS}.")
    if rows < 0:
        raise UsageError(f"The number of sample rows is {rows}; it must be 0 or more.")
    task = load_tasks()[dataset]
    language = "python" if task.language == "code" else task.language
    return [_make_row(dataset, language, tokens, f"{dataset}/{seed}/{tokens}/{index}") for index in range(rows)]


def make_draft(dataset: str, rng: Rng, tokens: float, repeat_prob: float = 0.0) -> Draft:
    """Return the draft of one row of `dataset` whose prompt has about `tokens` estimated tokens.

    `repeat_prob` is for training. It may be above 0 for datasets of facts and for retrieval only: a fact is then
    followed, with that probability, by an earlier one whose value is marked, and a sentence of a paragraph by its
    heading.
    """
    tokens -= estimate_tokens(load_template(dataset).format(context="", input=""))
    return _GENERATORS[dataset](rng, tokens, repeat_prob) if repeat_prob else _GENERATORS[dataset](rng, tokens)


@cache
def load_template(dataset: str) -> str:
    """Return the official prompt template of a dataset."""
    return load_tasks()[dataset].template


def _make_row(dataset: str, language: str, tokens: int, key: str) -> dict[str, Any]:
    draft = make_draft(dataset, Rng(key), tokens)
    context, query = strip_marks(draft.context), strip_marks(draft.input)
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
