"""One dataset of a run: what is wanted of it and what is missing; and in which order many are done at once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sparsecache.longbench.data import Rows
from sparsecache.longbench.records import PredictionFile
from sparsecache.longbench.tasks import Task

Row = dict[str, Any]
STEP_BYTES = 6000
"""Of a prompt, taken to cost as much as one more token of its answer."""


@dataclass(frozen=True)
class Work:
    """One dataset of a run: its rows, its open prediction file, and how many rows are wanted of it."""

    task: Task
    stem: str
    rows: Rows
    file: PredictionFile
    wanted: int

    def pending(self) -> Iterator[Row]:
        """The wanted rows that are not finished, in the benchmark's order."""
        return (self.rows.dataset[at] for at in self._places())

    @property
    def missing(self) -> int:
        """How many those are."""
        return len(self._places())

    def sizes(self) -> Iterator[tuple[int, int]]:
        """The place of each of them in `rows`, and how long its text is, in bytes: they tell tokens in any language."""
        for at in self._places():
            row = self.rows.dataset[at]
            yield at, len(row["context"].encode("utf-8", "surrogatepass")) + len(row["input"])

    def _places(self) -> list[int]:
        ids = self.rows.dataset["_id"][: self.wanted]
        return [at for at, row_id in enumerate(ids) if row_id not in self.file.done]


def in_order(works: Iterable[Work]) -> Iterator[tuple[Work, Row]]:
    """Every pending row, dataset by dataset."""
    return ((work, row) for work in works for row in work.pending())


def longest_first(works: Iterable[Work]) -> Iterator[tuple[Work, Row]]:
    """Every pending row, first those that may take longest, so that the last ones end at about the same time.

    It goes by the size of the text and the dataset's cap: no prompt has to be made to know what comes first.
    """
    sized = [(size + STEP_BYTES * work.task.max_new_tokens, work, at) for work in works for at, size in work.sizes()]
    for _, work, at in sorted(sized, key=lambda each: each[0], reverse=True):
        yield work, work.rows.dataset[at]


def largest(works: Iterable[Work]) -> Iterator[tuple[Work, Row]]:
    """The pending row with the longest text of each dataset, where there is one."""
    for work in works:
        place, _ = max(work.sizes(), key=lambda each: each[1], default=(None, 0))
        if place is not None:
            yield work, work.rows.dataset[place]
