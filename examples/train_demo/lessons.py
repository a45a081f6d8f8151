"""Training sequences of the kinds of the sample: a row's prompt and answer, then more questions on the same text.

The first question of a lesson is made as the sample makes its rows; keys begin with `lesson/`, which no row's key
does, so a lesson never is a row. It knows no tokenizer: texts are encoded by the caller's function.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from sparsecache.synthetic.build import Question, Rng, split_marks
from sparsecache.synthetic.rows import load_template, make_draft

Encode = Callable[[str], list[int]]

BOS, EOS = 0, 1
ORDINARY, SETTLED = 0, 1

# How often each dataset is drawn for training.
MIX = {
    "narrativeqa": 0.06,
    "qasper": 0.06,
    "multifieldqa_en": 0.06,
    "multifieldqa_zh": 0.05,
    "hotpotqa": 0.08,
    "2wikimqa": 0.06,
    "musique": 0.08,
    "dureader": 0.06,
    "gov_report": 0.03,
    "qmsum": 0.04,
    "multi_news": 0.03,
    "vcsum": 0.04,
    "trec": 0.02,
    "triviaqa": 0.02,
    "samsum": 0.02,
    "lsht": 0.02,
    "passage_count": 0.05,
    "passage_retrieval_en": 0.10,
    "passage_retrieval_zh": 0.08,
    "lcc": 0.02,
    "repobench-p": 0.02,
}


@dataclass(frozen=True)
class _Plan:
    """How the tokens of a lesson are shared out.

    `ratio`: tokens of a 4,096 vocabulary for an estimated one. `cost` tokens are kept back for each of the further
    questions (or of the sentences of a summary): one for `each` tokens of the lesson, `most` at most. With
    `repeats`, the text says earlier facts again.
    """

    ratio: float
    each: int = 1
    most: int = 0
    cost: int = 0
    repeats: bool = False


_PLANS = {
    "narrativeqa": _Plan(0.98, 75, 60, 25, repeats=True),
    "qasper": _Plan(1.14, 75, 60, 28, repeats=True),
    "multifieldqa_en": _Plan(1.02, 75, 60, 25, repeats=True),
    "multifieldqa_zh": _Plan(1.14, 75, 60, 26, repeats=True),
    "hotpotqa": _Plan(0.97, 75, 60, 34, repeats=True),
    "2wikimqa": _Plan(0.97, 75, 60, 38, repeats=True),
    "musique": _Plan(0.98, 75, 60, 46, repeats=True),
    "dureader": _Plan(1.07, 75, 60, 36, repeats=True),
    "gov_report": _Plan(0.93, 125, 9, 21),
    "qmsum": _Plan(1.03, 256, 12, 54, repeats=True),
    "multi_news": _Plan(0.94, 150, 8, 21),
    "vcsum": _Plan(1.09, 240, 10, 17),
    "trec": _Plan(1.05, 120, 16, 22),
    "triviaqa": _Plan(0.93, 1000, 1, 300),
    "samsum": _Plan(1.08, 1000, 1, 120),
    "lsht": _Plan(1.04, 160, 12, 72),
    "passage_count": _Plan(0.90, 110, 24, 23),
    "passage_retrieval_en": _Plan(0.93, 150, 24, 40, repeats=True),
    "passage_retrieval_zh": _Plan(1.07, 150, 24, 50, repeats=True),
    "lcc": _Plan(1.15, 80, 24, 28),
    "repobench-p": _Plan(1.14, 80, 24, 28),
}
_REPEATS = 0.12
_TRIES = 8


def lesson(dataset: str, tokens: int, key: str, encode: Encode) -> tuple[list[int], list[int]]:
    """Ids and flags of a training sequence of at most `tokens` tokens, BOS first.

    A flag is 1 (SETTLED) where the text before settles the token: answers with the EOS after each, labels of
    classes that were shown before with the line end after them, values of facts and headings that are said
    again, calls of functions; else it is 0. Three lessons in four are nearly full, the others 55 to 100 %; each
    holds one text, and one in ten only its first question. The same arguments give the same lesson. Room is
    planned for a 4,096 vocabulary and 256 tokens or more; below, the end may be cut off together with its answer.
    """
    key = f"lesson/{dataset}/{tokens}/{key}"
    rng = Rng(key)
    target = tokens if rng.chance(0.75) else rng.span(tokens * 55 // 100, tokens)
    plan = _PLANS[dataset]
    questions = 0 if rng.chance(0.1) else min(plan.most, target // plan.each)
    room = (target - questions * plan.cost) / plan.ratio
    for _ in range(_TRIES):
        draft = make_draft(dataset, Rng(f"{key}/text"), room, _REPEATS if plan.repeats else 0.0)
        sequence = _Sequence(encode)
        sequence.add(load_template(dataset).format(context=draft.context, input=draft.input), draft.answers[0])
        if len(sequence.ids) <= tokens:
            break
        room *= 0.97 * tokens / len(sequence.ids)
    sequence.cut(tokens)
    if questions:
        frame, short = _frames(dataset)
        more = (((frame if rng.chance(0.1) else short).format(input=query), answer) for query, answer in draft.more)
        sequence.add_while_short(more, target)
    return sequence.ids, sequence.flags


@cache
def _frames(dataset: str) -> tuple[str, str]:
    """What puts a further question: all of the template that follows the context, and the least of it."""
    after = load_template(dataset).partition("{context}")[2]
    if "{input}" not in after:
        after = "{input}" + after
    before, _, end = after.partition("{input}")
    lead, last = before.rfind("\n\n"), end.rfind("\n\n")
    short = before[max(lead, 0) :] + "{input}" + end[max(last, 0) :]
    lead_in = "" if short.startswith("\n") else "\n"
    return lead_in + after, lead_in + short


class _Sequence:
    """Token ids and their flags, growing."""

    def __init__(self, encode: Encode) -> None:
        self.encode = encode
        self.ids, self.flags = [BOS], [ORDINARY]

    def add(self, prompt: str, answer: str) -> None:
        """The prompt, which may hold marks, then the answer and its EOS. A blank goes after a colon."""
        for piece, settled in split_marks(prompt):
            self._add(self.encode(piece), SETTLED if settled else ORDINARY)
        self._add(self.encode(f" {answer}" if prompt.endswith(":") else answer), SETTLED)
        self._add([EOS], SETTLED)

    def _add(self, ids: list[int], flag: int) -> None:
        self.ids += ids
        self.flags += [flag] * len(ids)

    def add_while_short(self, questions: Iterable[Question], most: int) -> None:
        """As many of the questions as fit into `most` tokens in all."""
        for question in questions:
            length = len(self.ids)
            self.add(*question)
            if len(self.ids) > most:
                self.cut(length)
                return

    def cut(self, length: int) -> None:
        """Keep the first `length` tokens at most."""
        del self.ids[length:], self.flags[length:]
