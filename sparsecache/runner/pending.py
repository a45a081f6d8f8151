"""The rows of a dataset that a run must still decode, and the order in which rows of several datasets are decoded."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sparsecache.longbench.data import Rows
from sparsecache.longbench.records import PredictionFile, RunFolder
from sparsecache.longbench.tasks import Task

Row = dict[str, Any]
STEP_BYTES = 6000
"""Bytes of a prompt that are assumed to take as long as one new token."""


@dataclass(frozen=True)
class WantedDataset:
    """One dataset of a run: its rows, and the number of them that are wanted, from the first on."""

    task: Task
    stem: str
    rows: Rows
    num_wanted: int

    @property
    def wanted_ids(self) -> list[str]:
        """Return the `_id` of every wanted row."""
        return self.rows.ids[: self.num_wanted]

    @contextmanager
    def open(self, folder: RunFolder) -> Iterator["PendingDataset"]:
        """Open the prediction file in `folder`, and close it at the end. Raises UsageError as PredictionFile."""
        with PredictionFile(folder.predictions(self.stem)) as file:
            yield PendingDataset(self.task, self.stem, self.rows, self.num_wanted, file)


@dataclass(frozen=True)
class PendingDataset(WantedDataset):
    """A wanted dataset with its open prediction file."""

    file: PredictionFile

    def pending(self) -> Iterator[Row]:
        """Yield the wanted rows that are not finished, in the benchmark's order."""
        return (self.rows.dataset[index] for index in self._indices())

    @property
    def num_missing(self) -> int:
        """Return the number of wanted rows that are not finished."""
        return len(self._indices())

    @property
    def missing_ids(self) -> list[str]:
        """Return the `_id` of every wanted row that is not finished."""
        return [row_id for row_id in self.wanted_ids if row_id not in self.file.done]

    def sizes(self) -> Iterator[tuple[int, int]]:
        """Yield the index of each pending row and its size in bytes, which orders texts of any language by tokens."""
        for index in self._indices():
            row = self.rows.dataset[index]
            yield index, len(row["context"].encode("utf-8", "surrogatepass")) + len(row["input"])

    def _indices(self) -> list[int]:
        return [index for index, row_id in enumerate(self.wanted_ids) if row_id not in self.file.done]


def in_order(datasets: Iterable[PendingDataset]) -> Iterator[tuple[PendingDataset, Row]]:
    """Yield every pending row, dataset by dataset."""
    return ((dataset, row) for dataset in datasets for row in dataset.pending())


def longest_first(datasets: Iterable[PendingDataset]) -> Iterator[tuple[PendingDataset, Row]]:
    """Yield every pending row, the slowest first, so that workers end at about the same time.

    The order follows the bytes of the text and the dataset's limit of new tokens; no prompt is built for it.
    """
    sized = [
        (size + STEP_BYTES * dataset.task.max_new_tokens, dataset, index)
        for dataset in datasets
        for index, size in dataset.sizes()
    ]
    for _, dataset, index in sorted(sized, key=lambda each: each[0], reverse=True):
        yield dataset, dataset.rows.dataset[index]


def longest_per_dataset(datasets: Iterable[PendingDataset]) -> Iterator[tuple[PendingDataset, Row]]:
    """Yield the longest pending row of each dataset that has one."""
    for dataset in datasets:
        index, _ = max(dataset.sizes(), key=lambda each: each[1], default=(None, 0))
        if index is not None:
            yield dataset, dataset.rows.dataset[index]
