"""Training sequences: the prompt and answer of a synthetic row, then more questions about the same context.

Keys of lessons begin with `lesson/` and keys of rows never do, so no lesson is a row of `--data sample`. This module
is independent of the tokenizer: the caller passes the function that encodes text.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from sparsecache.synthetic.draft import QAPair, Rng, split_marks
from sparsecache.synthetic.rows import load_template, make_draft

Encode = Callable[[str], list[int]]

BOS, EOS = 0, 1
ORDINARY, PREDICTABLE, PADDING = 0, 1, 2  # token flags; padding is added by the training loop

# Share of each dataset in the training data.
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
class _Spec:
    """How the tokens of a lesson of one dataset are divided.

    `ratio`: tokens (4,096-entry vocabulary) per estimated token. Follow-up questions (or sentences of a summary): one
    per `tokens_per_question` tokens of the lesson, at most `max_questions`, with `question_tokens` reserved for each.
    `repeats`: the context repeats earlier facts.
    """

    ratio: float
    tokens_per_question: int
    max_questions: int
    question_tokens: int
    repeats: bool = False


_SPECS = {
    "narrativeqa": _Spec(0.98, 75, 60, 25, repeats=True),
    "qasper": _Spec(1.14, 75, 60, 28, repeats=True),
    "multifieldqa_en": _Spec(1.02, 75, 60, 25, repeats=True),
    "multifieldqa_zh": _Spec(1.14, 75, 60, 26, repeats=True),
    "hotpotqa": _Spec(0.97, 75, 60, 34, repeats=True),
    "2wikimqa": _Spec(0.97, 75, 60, 38, repeats=True),
    "musique": _Spec(0.98, 75, 60, 46, repeats=True),
    "dureader": _Spec(1.07, 75, 60, 36, repeats=True),
    "gov_report": _Spec(0.93, 125, 9, 21),
    "qmsum": _Spec(1.03, 256, 12, 54, repeats=True),
    "multi_news": _Spec(0.94, 150, 8, 21),
    "vcsum": _Spec(1.09, 240, 10, 17),
    "trec": _Spec(1.05, 120, 16, 22),
    "triviaqa": _Spec(0.93, 1000, 1, 300),
    "samsum": _Spec(1.08, 1000, 1, 120),
    "lsht": _Spec(1.04, 160, 12, 72),
    "passage_count": _Spec(0.90, 110, 24, 23),
    "passage_retrieval_en": _Spec(0.93, 150, 24, 40, repeats=True),
    "passage_retrieval_zh": _Spec(1.07, 150, 24, 50, repeats=True),
    "lcc": _Spec(1.15, 80, 24, 28),
    "repobench-p": _Spec(1.14, 80, 24, 28),
}
_REPEAT_PROB = 0.12
_MAX_ATTEMPTS = 8


def lesson(dataset: str, tokens: int, key: str, encode: Encode) -> tuple[list[int], list[int]]:
    """The token ids and flags of one training sequence of at most `tokens` tokens, starting with BOS.

    A flag is PREDICTABLE where the text before the token determines it: answers and the EOS after each, labels of
    classes that occurred before, repeated values and headings, function calls. Otherwise it is ORDINARY. Three of four
    lessons are nearly full, the others are 55 to 100 % full. Each has one context; one in ten has only its first
    question. The same arguments give the same lesson. Lengths are planned for a 4,096-entry vocabulary and at least
    256 tokens; shorter lessons may be cut, answer included.
    """
    key = f"lesson/{dataset}/{tokens}/{key}"
    rng = Rng(key)
    target = tokens if rng.chance(0.75) else rng.randint(tokens * 55 // 100, tokens)
    spec = _SPECS[dataset]
    questions = 0 if rng.chance(0.1) else min(spec.max_questions, target // spec.tokens_per_question)
    estimated = (target - questions * spec.question_tokens) / spec.ratio
    for _ in range(_MAX_ATTEMPTS):
        draft = make_draft(dataset, Rng(f"{key}/text"), estimated, _REPEAT_PROB if spec.repeats else 0.0)
        sequence = _Sequence(encode)
        sequence.add(load_template(dataset).format(context=draft.context, input=draft.input), draft.answers[0])
        if len(sequence.ids) <= tokens:
            break
        estimated *= 0.97 * tokens / len(sequence.ids)
    sequence.cut(tokens)
    if questions:
        full, short = _question_templates(dataset)
        pairs = (((full if rng.chance(0.1) else short).format(input=query), a) for query, a in draft.follow_ups)
        sequence.add_while_fits(pairs, target)
    return sequence.ids, sequence.flags


@cache
def _question_templates(dataset: str) -> tuple[str, str]:
    """Templates of a follow-up question: the whole official template after the context, and a short form of it."""
    after = load_template(dataset).partition("{context}")[2]
    if "{input}" not in after:
        after = "{input}" + after
    before, _, end = after.partition("{input}")
    first, last = before.rfind("\n\n"), end.rfind("\n\n")
    short = before[max(first, 0) :] + "{input}" + end[max(last, 0) :]
    separator = "" if short.startswith("\n") else "\n"
    return separator + after, separator + short


class _Sequence:
    """Token ids and their flags."""

    def __init__(self, encode: Encode) -> None:
        self.encode = encode
        self.ids, self.flags = [BOS], [ORDINARY]

    def add(self, prompt: str, answer: str) -> None:
        """Append the prompt, which may hold marks, the answer and EOS. A space follows a final colon."""
        for piece, marked in split_marks(prompt):
            self._add(self.encode(piece), PREDICTABLE if marked else ORDINARY)
        self._add(self.encode(f" {answer}" if prompt.endswith(":") else answer), PREDICTABLE)
        self._add([EOS], PREDICTABLE)

    def _add(self, ids: list[int], flag: int) -> None:
        self.ids += ids
        self.flags += [flag] * len(ids)

    def add_while_fits(self, pairs: Iterable[QAPair], max_tokens: int) -> None:
        """Append questions and answers until the next one would exceed `max_tokens` in all."""
        for pair in pairs:
            length = len(self.ids)
            self.add(*pair)
            if len(self.ids) > max_tokens:
                self.cut(length)
                return

    def cut(self, length: int) -> None:
        """Keep the first `length` tokens."""
        del self.ids[length:], self.flags[length:]
