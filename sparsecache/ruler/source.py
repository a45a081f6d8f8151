"""The data source of RULER's tasks: rows that fill a length, counted with the tokenizer of the run."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sparsecache.errors import UsageError, one_line
from sparsecache.longbench.jsonl import dumps
from sparsecache.longbench.prompts import Prompter
from sparsecache.longbench.tasks import Task
from sparsecache.longbench.wrapping import encode
from sparsecache.ruler.counting import CommonWords, FrequentWords
from sparsecache.ruler.draft import Draft
from sparsecache.ruler.fill import TooLongError, fill
from sparsecache.ruler.needles import Needles
from sparsecache.ruler.questions import Questions, read_hotpotqa, read_squad
from sparsecache.ruler.texts import ESSAY_TASKS, RulerTexts, read_essays
from sparsecache.ruler.tracking import Tracking
from sparsecache.synthetic.draft import Rng

_NEEDLES: dict[str, dict[str, Any]] = {
    "niah_single_1": {"haystack": "noise"},
    "niah_single_2": {"haystack": "essay"},
    "niah_single_3": {"haystack": "essay", "value": "uuids"},
    "niah_multikey_1": {"haystack": "essay", "keys": 4},
    "niah_multikey_2": {"haystack": "needle"},
    "niah_multikey_3": {"haystack": "needle", "key": "uuids", "value": "uuids"},
    "niah_multivalue": {"haystack": "essay", "values": 4},
    "niah_multiquery": {"haystack": "essay", "keys": 4, "queries": 4},
}


@dataclass(frozen=True)
class RulerSource:
    """Generates `rows` rows per task of RULER from `seed`; the prompts fill the task's length.

    A prompt with its chat wrapper and answer prefix has at most the task's length less its new tokens. Row i depends on
    the seed, the tokenizer with the wrapper, the length and the texts, not on `rows`.
    """

    prompter: Prompter
    rows: int
    seed: int
    texts: RulerTexts
    published: bool = field(default=False, init=False)
    fills_rows: bool = field(default=False, init=False)

    def read(self, task: Task, e: bool) -> tuple[str, bytes]:
        """Return a name for messages, and the rows of one task as JSON Lines.

        Raises UsageError for a length that the question alone exceeds, and for texts that cannot be read.
        """
        assert task.length is not None
        name = f"RULER's {task.base_name} of {task.length} tokens"
        make = self._generator(task)
        lines: list[str] = []
        size: int | None = None
        for number in range(self.rows):
            try:
                size, row = self._row(task, make, number, size)
            except TooLongError as error:
                raise UsageError(
                    f"--ruler_length {task.length} is too short for {task.base_name}: its shortest prompt and "
                    f"{task.max_new_tokens} new tokens are {error.tokens} tokens."
                ) from error
            except ValueError as error:  # a chat template that changes the text
                raise UsageError(f"Prompts of {name} cannot be built: {one_line(error)}") from error
            lines.append(dumps(row) + "\n")
        return name, "".join(lines).encode()

    def describe(self) -> dict[str, Any]:
        """Return the entry of this source in run.json."""
        texts = {key: str(path) for key, path in vars(self.texts).items() if path is not None}
        return {"source": "ruler", "rows": self.rows, "seed": self.seed, **texts}

    def _row(self, task: Task, make: "_Generator", number: int, start: int | None) -> tuple[int, dict[str, Any]]:
        key = f"{task.name}/{self.seed}/{number}"

        def row(size: int) -> dict[str, Any]:
            draft = make.draft(Rng(key), size, number)
            made = {
                "input": draft.input,
                "context": draft.context,
                "answers": draft.answers,
                "length": 0,  # counted below
                "dataset": task.name,
                "language": task.language,
                "all_classes": None,
                "_id": hashlib.sha256(key.encode()).hexdigest()[:24],
                "examples": draft.examples,
            }
            return {**made, "length": self.prompter.num_tokens(task, made) + task.max_new_tokens}

        return fill(row, lambda row: int(row["length"]), task.length or 0, make.min_size(number), make.max_size, start)

    def _generator(self, task: Task) -> "_Generator":
        name = task.base_name
        if name in _NEEDLES:
            needles = Needles(**_NEEDLES[name], essay=self._essay if name in ESSAY_TASKS else ())
            min_size = 2 if name in ESSAY_TASKS else needles.keys * needles.values
            return _Generator(lambda rng, size, _: needles.make(rng, size), lambda _: min_size)
        if name == "vt":
            tracking = Tracking(task, lambda text: len(encode(self.prompter.tokenizer, text)))
            return _Generator(lambda rng, size, _: tracking.make(rng, size), lambda _: 5)
        if name == "cwe":
            common = CommonWords(task)
            return _Generator(lambda rng, size, _: common.make(rng, size), lambda _: 11, common.max_size)
        if name == "fwe":
            frequent = FrequentWords(task)
            return _Generator(lambda rng, size, _: frequent.make(rng, size), lambda _: 40)
        questions = self._squad if name == "qa_1" else self._hotpotqa
        return _Generator(questions.make, questions.min_size)

    @cached_property
    def _essay(self) -> tuple[str, ...]:
        assert self.texts.essays is not None
        return read_essays(self.texts.essays)

    @cached_property
    def _squad(self) -> Questions:
        assert self.texts.squad is not None
        return read_squad(self.texts.squad)

    @cached_property
    def _hotpotqa(self) -> Questions:
        assert self.texts.hotpotqa is not None
        return read_hotpotqa(self.texts.hotpotqa)


@dataclass(frozen=True)
class _Generator:
    """A task's drafts by random source, size and row; the smallest size of a row, and the largest of any row."""

    draft: Callable[[Rng, int, int], Draft]
    min_size: Callable[[int], int]
    max_size: int = 2**40
