"""Questions over documents, from the files of SQuAD and HotpotQA."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsecache.errors import UsageError
from sparsecache.longbench.jsonl import read_json
from sparsecache.ruler.draft import Draft, sample
from sparsecache.synthetic.draft import Rng


@dataclass(frozen=True)
class Question:
    """A question, its answers, and the indices of documents: those that it is about, and related ones."""

    text: str
    answers: list[str]
    documents: list[int]
    related: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Questions:
    """Questions and all documents of their file."""

    path: Path
    questions: Sequence[Question]
    documents: Sequence[str]

    def make(self, rng: Rng, size: int, row: int) -> Draft:
        """Return the question of a row among at least `size` documents: its own, related and other ones.

        Raises UsageError for a row beyond the questions of the file.
        """
        if row >= len(self.questions):
            raise UsageError(
                f"{self.path} has {len(self.questions)} questions with an answer, so --ruler_rows is at most that."
            )
        question = self.questions[row]
        known = {*question.documents, *question.related}
        others = [at for at in range(len(self.documents)) if at not in known]
        chosen = [*question.documents, *sample(rng, question.related), *sample(rng, others)][:size]
        # Documents repeat if there are too few.
        chosen += [at % len(self.documents) for at in range(size - len(chosen))]
        shown = enumerate(sample(rng, chosen), 1)
        context = "\n\n".join(f"Document {number}:\n{self.documents[at]}" for number, at in shown)
        return Draft(context, question.text, question.answers)

    def min_size(self, row: int) -> int:
        """Return the number of documents that the question of a row needs."""
        return len(self.questions[row].documents) if row < len(self.questions) else 1


def read_squad(path: Path) -> Questions:
    """Read a file of SQuAD, version 1.1 or 2.0. Questions without an answer are left out.

    Raises UsageError for another file.
    """
    return _read(path, _parse_squad, "SQuAD (dev-v2.0.json)", "--ruler_squad")


def read_hotpotqa(path: Path) -> Questions:
    """Read a file of HotpotQA in the distractor setting. Raises UsageError for another file."""
    return _read(path, _parse_hotpotqa, "HotpotQA (hotpot_dev_distractor_v1.json)", "--ruler_hotpotqa")


def _read(path: Path, parse: Callable[[Path, Any], Questions], kind: str, option: str) -> Questions:
    try:
        found = parse(path, read_json(path))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise UsageError(f"{path} is not a file of {kind}. Name one with {option}.") from error
    if not found.questions:
        raise UsageError(f"{path} holds no question with an answer. Name a file of {kind} with {option}.")
    return found


def _parse_squad(path: Path, content: Any) -> Questions:
    articles = [[_text(part["context"]) for part in article["paragraphs"]] for article in content["data"]]
    documents = sorted({text for article in articles for text in article})
    index = {text: at for at, text in enumerate(documents)}
    questions = []
    for article, texts in zip(content["data"], articles, strict=True):
        of_article = list(dict.fromkeys(index[text] for text in texts))
        for part, context in zip(article["paragraphs"], texts, strict=True):
            related = [at for at in of_article if at != index[context]]
            for asked in part["qas"]:
                answers = [text for answer in asked["answers"] if (text := _text(answer["text"]))]
                if answers and not asked.get("is_impossible"):
                    questions.append(Question(_text(asked["question"]), answers, [index[context]], related))
    return Questions(path, questions, documents)


def _parse_hotpotqa(path: Path, content: Any) -> Questions:
    def texts(asked: Any) -> list[str]:
        return [f"{_text(title)}\n{''.join(map(_text, sentences))}" for title, sentences in asked["context"]]

    documents = sorted({text for asked in content for text in texts(asked)})
    index = {text: at for at, text in enumerate(documents)}
    questions = []
    for asked in content:
        own = list(dict.fromkeys(index[text] for text in texts(asked)))
        if own and (answer := _text(asked["answer"])):
            questions.append(Question(_text(asked["question"]), [answer], own))
    return Questions(path, questions, documents)


def _text(value: Any) -> str:
    """Return a text of a file. Raises TypeError for another value, ValueError for one that UTF-8 cannot hold."""
    if not isinstance(value, str):
        raise TypeError
    value.encode()
    return value
