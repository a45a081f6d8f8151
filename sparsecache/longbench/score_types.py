"""Scores of rows, datasets and runs, and their averages. In one file because each is made of the one before."""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from sparsecache.longbench.kept import KeptStats, aggregate_kept
from sparsecache.longbench.run_record import RunRecord
from sparsecache.longbench.tasks import CATEGORIES, OWN, Task, load_tasks, ruler_names

BUCKETS = ("0-4k", "4-8k", "8k+")
STRATA = ("easy", "hard", "short", "medium", "long")
"""Parts of LongBench v2: two by difficulty and three by length."""
MEANS = {
    "longbench": "flat_mean",
    "longbench_v2": "longbench_v2",
    "longbench_v2_cot": "longbench_v2_cot",
    "ruler": "ruler",
    OWN: "own_mean",
}
"""The name of the mean over the datasets of each group (`Task.group`) in `RunScore.averages`."""
GROUP_NAMES = {
    "longbench": "LongBench",
    "longbench_v2": "LongBench v2",
    "longbench_v2_cot": "LongBench v2 with chain of thought",
    "ruler": "RULER",
    OWN: "own tasks",
}
"""What tables and plots call the groups."""


@dataclass(frozen=True)
class RowScore:
    """The score of one row, 0 to 1, its length in words (None if not recorded), and flags.

    ended_by_length: whether the answer was cut off at the limit of new tokens, or its reasoning did not end.
    no_letter: whether the answer to a multiple-choice question gives no letter. strata: those of STRATA it is in.
    """

    score: float
    length: float | None
    empty: bool
    metric_error: bool
    error_row: bool
    recursion_exceeded: bool
    ended_by_length: bool = False
    no_letter: bool = False
    strata: tuple[str, ...] = ()


@dataclass(frozen=True)
class Summary:
    """A mean in percent and its standard error over `n` rows.

    None for no rows; no error for a single row.
    """

    score: float | None
    stderr: float | None
    n: int


@dataclass(frozen=True)
class DatasetScore:
    """The scores of one dataset.

    rows: a score per row. records: the rows of the file, in the same order. expected: the expected number of rows, None
    if unknown. warnings: phrases that qualify the score. rouge_score: values of the package rouge-score, if requested.
    """

    task: Task
    e: bool
    rows: list[RowScore]
    expected: int | None
    warnings: list[str]
    rouge_score: dict[str, float] | None = None
    kept: KeptStats | None = None
    records: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def summary(self) -> Summary:
        """The mean over all rows, rounded to two decimals as the official scorer does."""
        return _summary([row.score for row in self.rows])

    @cached_property
    def buckets(self) -> dict[str, Summary]:
        """The mean per length bucket of LongBench-E. Rows without a length are in no bucket."""
        members: dict[str, list[float]] = {name: [] for name in BUCKETS}
        for row in self.rows:
            if row.length is not None:
                members[bucket(row.length)].append(row.score)
        return {name: _summary(scores, _numpy_mean_in_percent) for name, scores in members.items()}

    @cached_property
    def strata(self) -> dict[str, "DatasetScore"]:
        """The parts of LongBench v2 that have rows, each as a dataset of its own; empty for other datasets."""
        places = {name: [at for at, row in enumerate(self.rows) if name in row.strata] for name in STRATA}
        return {name: self.only(at) for name, at in places.items() if at}

    def only(self, indices: Sequence[int]) -> "DatasetScore":
        """Return the score over the rows at these indices, all of which count as expected."""
        records = [self.records[at] for at in indices] if self.records else []
        rows = [self.rows[at] for at in indices]
        return DatasetScore(
            self.task, self.e, rows, len(rows), [], kept=aggregate_kept(records), records=records
        )  # fmt: skip

    @property
    def num_ended_by_length(self) -> int | None:
        """The number of answers that were cut off; None if no row records how its answer ended."""
        known = any("finish_reason" in record for record in self.records)
        found = self.count("ended_by_length")
        return found if known or found else None

    @property
    def num_finished(self) -> int:
        """The number of rows without an error."""
        return len(self.rows) - self.count("error_row")

    @property
    def num_requested(self) -> int:
        """The number of requested rows; the number of rows found if unknown."""
        return len(self.rows) if self.expected is None else self.expected

    @property
    def complete(self) -> bool:
        """Whether every requested row is present and without an error."""
        return self.num_finished == len(self.rows) == self.num_requested

    def count(self, flag: str) -> int:
        """Return the number of rows with a flag of RowScore, such as `error_row`."""
        return sum(getattr(row, flag) for row in self.rows)


@dataclass(frozen=True)
class Average:
    """A mean over datasets or categories.

    datasets: datasets in it, of `of_datasets` published ones. n: rows. kept: the mean of their shares of past tokens
    attended to, over the datasets that report one.
    """

    score: float | None
    stderr: float | None
    datasets: int
    of_datasets: int
    n: int
    kept: float | None = None

    @property
    def partial(self) -> bool:
        """Whether datasets are missing."""
        return self.datasets < self.of_datasets


@dataclass(frozen=True)
class RunScore:
    """The scores of one folder of predictions. run: its run.json. label: its name in tables and plots, if given."""

    folder: Path
    e: bool
    datasets: list[DatasetScore]
    run: RunRecord = field(default_factory=RunRecord)
    label: str = ""

    @property
    def complete(self) -> bool:
        """Whether every dataset is complete."""
        return all(dataset.complete for dataset in self.datasets)

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return sum(len(dataset.rows) for dataset in self.datasets)

    @property
    def num_failed(self) -> int:
        """The number of rows with an error."""
        return sum(dataset.count("error_row") for dataset in self.datasets)

    @property
    def failed(self) -> bool:
        """Whether there are rows, and all of them failed."""
        return self.num_failed == self.num_rows > 0

    @cached_property
    def categories(self) -> dict[str, Average]:
        """The mean over the datasets of each category, and over RULER's tasks per length if there are several."""
        lengths = self.ruler_lengths if len(self.ruler_lengths) > 1 else []
        return {
            **{name: self._mean(lambda task, name=name: task.category == name) for name in CATEGORIES},  # type: ignore[misc]
            **{f"ruler_{length}": self._ruler_mean([length]) for length in lengths},
        }

    @property
    def ruler_lengths(self) -> list[int]:
        """The lengths of RULER's tasks in this run, in ascending order."""
        return sorted({dataset.task.length for dataset in self.datasets if dataset.task.length is not None})

    @cached_property
    def averages(self) -> dict[str, Average]:
        """The official averages (means of category means) per language, and the mean over the datasets of each group.

        Code counts in both languages, as in the published tables. Without other datasets, code gives no average.
        LongBench v2, RULER and own tasks have a mean of their own, if the run has them.
        """
        others = {mean: self._group_mean(group) for group, mean in MEANS.items() if group != "longbench"}
        return {
            "avg_en": self._mean_of_categories(("en", "code")),
            "avg_zh": self._mean_of_categories(("zh", "code")),
            "avg_all": self._mean_of_categories(("en", "zh", "code")),
            "flat_mean": self._mean(lambda task: True),
            **{name: mean for name, mean in others.items() if mean.of_datasets},
        }

    @property
    def headline(self) -> Average:
        """The mean that stands for the run: over LongBench's datasets, else LongBench v2, RULER or own tasks."""
        means = [self.averages[name] for name in MEANS.values() if name in self.averages]
        return next((mean for mean in means if mean.datasets), means[0])

    def _group_mean(self, group: str) -> Average:
        if group == "ruler":
            return self._ruler_mean(self.ruler_lengths)
        members = [dataset for dataset in self.datasets if dataset.task.group == group]
        return _average([as_average(each) for each in members if each.summary.score is not None], len(members))

    def _ruler_mean(self, lengths: Sequence[int]) -> Average:
        """Return the mean over RULER's tasks in these lengths; each length has all tasks as published."""
        scored = [each for each in self.datasets if each.task.length in lengths and each.summary.score is not None]
        return _average(map(as_average, scored), len(ruler_names()) * len(lengths))

    def _mean(self, belongs: Callable[[Task], bool]) -> Average:
        published = [
            task
            for task in load_tasks().values()
            if task.group == "longbench" and task.published_rows(self.e) is not None
        ]
        of, names = sum(belongs(task) for task in published), {task.name for task in published}
        scored = [
            dataset
            for dataset in self.datasets
            if dataset.task.name in names and belongs(dataset.task) and dataset.summary.score is not None
        ]
        return _average([as_average(dataset) for dataset in scored], of)

    def _mean_of_categories(self, languages: Sequence[str]) -> Average:
        means = [
            self._mean(lambda task, name=name: task.category == name and task.language in languages)  # type: ignore[misc]
            for name in CATEGORIES
        ]
        of = sum(mean.of_datasets for mean in means)
        if not self._mean(lambda task: task.language in languages[:-1]).datasets:  # code alone gives no average
            return _average([], of)
        return _average([mean for mean in means if mean.score is not None], of)


def bucket(length: float) -> str:
    """Return the LongBench-E bucket of a row of `length` words."""
    return BUCKETS[0] if length < 4000 else BUCKETS[1] if length < 8000 else BUCKETS[2]


def mean_in_percent(scores: Sequence[float]) -> float:
    """Return the mean in percent, added left to right as the reference does.

    The built-in `sum` compensates rounding errors since Python 3.12.
    """
    return round(100 * functools.reduce(operator.add, scores, 0.0) / len(scores), 2)


def _numpy_mean_in_percent(scores: Sequence[float]) -> float:
    """Return the mean in percent, rounded by numpy as the reference does for buckets."""
    return float(numpy.round(100 * numpy.mean(list(scores)), 2))


def _summary(scores: Sequence[float], mean: Callable[[Sequence[float]], float] = mean_in_percent) -> Summary:
    if not scores:
        return Summary(None, None, 0)
    score = mean(scores)
    stderr = float(100 * numpy.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None
    return Summary(score, stderr, len(scores))


def as_average(dataset: DatasetScore) -> Average:
    """Return the score of a dataset as an average over one dataset."""
    kept = dataset.kept.share if dataset.kept else None
    return Average(dataset.summary.score, dataset.summary.stderr, 1, 1, dataset.summary.n, kept)


def _average(parts: Iterable[Average], of: int) -> Average:
    parts = list(parts)
    if not parts:
        return Average(None, None, 0, of, 0)
    score = sum(part.score for part in parts if part.score is not None) / len(parts)
    errors = [part.stderr for part in parts]
    known = [error for error in errors if error is not None]
    stderr = math.sqrt(sum(error**2 for error in known)) / len(parts) if len(known) == len(errors) else None
    shares = [part.kept for part in parts if part.kept is not None]
    kept = sum(shares) / len(shares) if shares else None
    return Average(score, stderr, sum(part.datasets for part in parts), of, sum(part.n for part in parts), kept)
