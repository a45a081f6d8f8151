"""From prediction files to scores: the official numbers, and everything that qualifies them."""

import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from sparsecache.errors import UsageError
from sparsecache.longbench import metrics, rouge
from sparsecache.longbench.jsonl import figure
from sparsecache.longbench.kept import Kept, kept_of
from sparsecache.longbench.prediction_row import NEEDED
from sparsecache.longbench.records import RunFolder, read_rows
from sparsecache.longbench.run_record import RunRecord
from sparsecache.longbench.tasks import CATEGORIES, Task, load_tasks
from sparsecache.longbench.text import chinese_words

BUCKETS = ("0-4k", "4-8k", "8k+")
Metric = Callable[[str, str, metrics.Context], float]


@dataclass(frozen=True)
class Options:
    """How to score where there is a choice.

    The defaults give what published tables give, but for rows beyond the reference's recursion limit, which get
    their true value (`official_recursion` gives 0.0).
    """

    edit_backend: str = metrics.EDIT_BACKENDS[0]
    official_recursion: bool = False
    rouge_score: bool = False
    allow_duplicates: bool = False


@dataclass(frozen=True)
class RowScore:
    """One row's score in 0 to 1, its length (None if the file lacks it), and what was odd about it."""

    score: float
    length: float | None
    empty: bool
    metric_error: bool
    error_row: bool
    too_deep: bool


@dataclass(frozen=True)
class Summary:
    """Mean of some scores in percent with its standard error; None without rows (and no error for one row)."""

    score: float | None
    stderr: float | None
    n: int


@dataclass(frozen=True)
class DatasetScore:
    """The score of one dataset and what a reader must know about it.

    records: the rows as they stand in the file, one for each of `rows`.
    """

    task: Task
    e: bool
    rows: list[RowScore]
    expected: int | None
    warnings: list[str]
    rouge_score: dict[str, float] | None = None
    kept: Kept | None = None
    records: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def summary(self) -> Summary:
        """Mean over all rows, as the official scorer rounds it (two decimals)."""
        return _summary([row.score for row in self.rows])

    @cached_property
    def buckets(self) -> dict[str, Summary]:
        """LongBench-E: the same by `length`; rows without a length are in no bucket."""
        members: dict[str, list[float]] = {name: [] for name in BUCKETS}
        for row in self.rows:
            if row.length is not None:
                members[bucket(row.length)].append(row.score)
        return {name: _summary(scores, _numpy_mean_in_percent) for name, scores in members.items()}

    @property
    def finished(self) -> int:
        """How many rows are there that are no error rows."""
        return len(self.rows) - self.count("error_row")

    @property
    def asked(self) -> int:
        """How many rows were asked for: all there are, where nobody says."""
        return len(self.rows) if self.expected is None else self.expected

    @property
    def complete(self) -> bool:
        """Whether every row that was asked for is there and none is an error row."""
        return self.finished == len(self.rows) == self.asked

    def count(self, remark: str) -> int:
        """How many rows carry a remark: empty, metric_error, error_row or too_deep."""
        return sum(getattr(row, remark) for row in self.rows)


@dataclass(frozen=True)
class Average:
    """A mean of means: how many datasets are in it, of how many, and over how many rows.

    kept: the same mean of the shares of past tokens attended to, over those datasets that report one.
    """

    score: float | None
    stderr: float | None
    datasets: int
    of: int
    n: int
    kept: float | None = None

    @property
    def partial(self) -> bool:
        """Whether datasets are missing from it."""
        return self.datasets < self.of


@dataclass(frozen=True)
class RunScore:
    """The scores of one folder of predictions."""

    folder: Path
    e: bool
    datasets: list[DatasetScore]
    run: RunRecord = field(default_factory=RunRecord)

    @property
    def complete(self) -> bool:
        """Whether every dataset in the folder is."""
        return all(dataset.complete for dataset in self.datasets)

    @cached_property
    def categories(self) -> dict[str, Average]:
        """Mean over the datasets of each category."""
        return {name: self._mean(lambda task, name=name: task.category == name) for name in CATEGORIES}  # type: ignore[misc]

    @cached_property
    def averages(self) -> dict[str, Average]:
        """The official Avg (mean of category means) for English, Chinese and all sets, and the flat mean.

        Code counts in both languages, as in the published tables, but is no average of a language by itself.
        """
        return {
            "avg_en": self._mean_of_categories(("en", "code")),
            "avg_zh": self._mean_of_categories(("zh", "code")),
            "avg_all": self._mean_of_categories(("en", "zh", "code")),
            "flat_mean": self._mean(lambda task: True),
        }

    def _mean(self, belongs: Callable[[Task], bool]) -> Average:
        published = [task for task in load_tasks().values() if task.published_rows(self.e) is not None]
        of = sum(belongs(task) for task in published)
        scored = [
            dataset
            for dataset in self.datasets
            if dataset.task in published and belongs(dataset.task) and dataset.summary.score is not None
        ]
        return _average([as_average(dataset) for dataset in scored], of)

    def _mean_of_categories(self, languages: Sequence[str]) -> Average:
        means = [
            self._mean(lambda task, name=name: task.category == name and task.language in languages)  # type: ignore[misc]
            for name in CATEGORIES
        ]
        of = sum(mean.of for mean in means)
        if not self._mean(lambda task: task.language in languages[:-1]).datasets:  # code alone is no language
            return _average([], of)
        return _average([mean for mean in means if mean.score is not None], of)


def bucket(length: float) -> str:
    """The LongBench-E bucket of a row of `length` words."""
    return BUCKETS[0] if length < 4000 else BUCKETS[1] if length < 8000 else BUCKETS[2]


def load_metric(name: str) -> Metric:
    """The metric of that name in metrics.py. Raises UsageError, with the names there are, for any other."""
    known = {
        key: function
        for key, function in vars(metrics).items()
        if inspect.isfunction(function) and function.__module__ == metrics.__name__ and not key.startswith("_")
    }
    if name not in known:
        raise UsageError(f"There is no metric {name!r} (configs/datasets.toml). Metrics: {', '.join(sorted(known))}.")
    return known[name]


def score_run(folder: Path, e: bool = False, options: Options = Options()) -> RunScore:
    """Scores every prediction file of a folder.

    With `e` its LongBench-E files: `<dataset>_e.jsonl`, or, in a folder from elsewhere that has none of these,
    `<dataset>.jsonl`. Raises UsageError for a folder without such files, a file of an unknown dataset, a line
    that is no row, or a repeated `_id`.
    """
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}. Give --model and --name of a run, or the path of its folder.")
    run = RunFolder(folder).load()
    expected = run.expected_rows
    scores = [
        score_file(path, task, e, expected.get(task.file_stem(e)), options)
        for task, path in _files(folder, e, foreign=not expected)
    ]
    there = {score.task.file_stem(e) for score in scores}
    missing = [task for task in load_tasks().values() if task.file_stem(e) in expected.keys() - there]
    scores += [DatasetScore(task, e, [], expected[task.file_stem(e)], ["its file is missing"]) for task in missing]
    return RunScore(folder, e, scores, run)


def score_file(path: Path, task: Task, e: bool, expected: int | None, options: Options) -> DatasetScore:
    """Scores one prediction file. `expected` rows are those of run.json; without one, the published number."""
    rows = list(read_rows(path, needed=NEEDED))
    warnings = _oddities(path, rows, e, options.allow_duplicates)
    if expected is None and (expected := task.published_rows(e)) is not None:
        warnings.append("no run.json tells how many rows were asked for, so the published number is expected")
    all_classes = rows[-1].get("all_classes") if rows else None  # of the last row, as the reference takes them
    scored = [_score_row(row, task, e, all_classes, options) for row in rows]
    second = _rouge_score(rows, task) if options.rouge_score and "rouge_l" in task.metric and rows else None
    result = DatasetScore(task, e, scored, expected, warnings, second, kept_of(rows), rows)
    warnings.extend(_many(result))
    return result


def _files(folder: Path, e: bool, foreign: bool) -> list[tuple[Task, Path]]:
    tasks = {
        task.file_stem(flag): (task, flag)
        for task in load_tasks().values()
        for flag in (False, True)
        if not flag or task.rows_e is not None
    }
    paths = sorted(folder.glob("*.jsonl"))
    unknown = [path.name for path in paths if path.stem not in tasks]
    if unknown:
        raise UsageError(
            f"{folder} holds files of no known dataset: {', '.join(unknown)}. Datasets: "
            f"{', '.join(load_tasks())}. Move them away, or add a table to configs/datasets.toml."
        )
    order = list(tasks)
    found = [(*tasks[path.stem], path) for path in sorted(paths, key=lambda path: order.index(path.stem))]
    if not found:
        raise UsageError(f"{folder} holds no <dataset>.jsonl file, so there is nothing to score.")
    chosen = [(task, path) for task, flag, path in found if flag == e]
    if not chosen and e and foreign:
        chosen = [(task, path) for task, _, path in found if task.rows_e is not None]
    if not chosen:
        way_out = "none belongs to LongBench-E" if e else "all are LongBench-E's (add --e)"
        raise UsageError(f"{folder} holds {len(found)} prediction files, but {way_out}.")
    return chosen


def _oddities(path: Path, rows: list[dict[str, Any]], e: bool, allow: bool) -> list[str]:
    """What is odd about a file, for the reader. Raises UsageError for what cannot be scored."""
    warnings = []
    ids = [str(row["_id"]) for row in rows if row.get("_id") is not None]
    repeated = len(ids) - len(set(ids))
    if repeated and not allow:
        raise UsageError(
            f"{path} repeats {repeated} _ids, so rows would count twice. Delete the repeats, or score it as it is, "
            f"as the official scorer would, with --allow_duplicates."
        )
    if repeated:
        warnings.append(f"{repeated} rows repeat an _id and count again")
    if len(ids) < len(rows):
        warnings.append(f"{len(rows) - len(ids)} rows have no _id, so repeats cannot be seen")
    if any(figure(row, "length") is None for row in rows):
        warnings.append("rows have no length" + (" and are in no bucket" if e else ""))
    return warnings


def _many(result: DatasetScore) -> list[str]:
    warnings = []
    for remark, words in (("empty", "are empty"), ("metric_error", "could not be scored and count 0.0")):
        if result.count(remark) > 0.01 * len(result.rows):
            warnings.append(f"{result.count(remark)} of {len(result.rows)} predictions {words}")
    if result.count("too_deep"):
        warnings.append(f"{result.count('too_deep')} rows get 0.0 from the reference scorer (recursion limit)")
    if result.count("error_row"):
        warnings.append(f"{result.count('error_row')} error rows count 0.0; run the prediction again to retry them")
    if result.expected is not None and len(result.rows) > result.expected:
        warnings.append("more rows than expected: appended re-runs?")
    return warnings


def _score_row(row: dict[str, Any], task: Task, e: bool, all_classes: Any, options: Options) -> RowScore:
    context = metrics.Context(all_classes, options.edit_backend, options.official_recursion)
    prediction = _scored_text(row["pred"], task)
    metric = load_metric(task.metric)
    score, failed = 0.0, False
    for answer in row["answers"]:
        try:
            score = max(score, metric(prediction, answer, context))
        except (ValueError, IndexError, TypeError, ZeroDivisionError):
            failed = True  # worth 0.0 to the reference; counted and shown here
    error_row = "error" in row
    empty = not row["pred"].strip() and not error_row
    return RowScore(
        score=score,
        length=figure(row, "length"),
        empty=empty,
        metric_error=failed and not empty and not error_row,
        error_row=error_row,
        too_deep=context.too_deep,
    )


def _scored_text(prediction: str, task: Task) -> str:
    return prediction.lstrip("\n").split("\n")[0] if task.first_line else prediction


def _rouge_score(rows: list[dict[str, Any]], task: Task) -> dict[str, float]:
    """The package rouge-score's ROUGE-1, -2 and -L F values in percent: a second opinion, over the same rows."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    tokenizer = _JiebaTokenizer() if task.language == "zh" else DefaultTokenizer()
    scorer = RougeScorer(("rouge1", "rouge2"), tokenizer=tokenizer)
    totals = {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    for row in (row for row in rows if row["answers"]):
        prediction = _scored_text(row["pred"], task)
        result = scorer.score_multi(row["answers"], prediction)
        for name in ("rouge1", "rouge2"):
            totals[name] += result[name].fmeasure
        words = tokenizer.tokenize(prediction)
        totals["rougeL"] += max(_lcs_f(words, tokenizer.tokenize(answer)) for answer in row["answers"])
    return {name: round(100 * total / len(rows), 2) for name, total in totals.items()}


def _lcs_f(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """The package's ROUGE-L, whose own table takes memory for each pair of words."""
    common = rouge.common_length(prediction, answer)
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


class _JiebaTokenizer:
    """For rouge-score, whose own tokenizer drops every Chinese character."""

    def tokenize(self, text: str) -> list[str]:
        return chinese_words(text)


def mean_in_percent(scores: Sequence[float]) -> float:
    """One addition after the other, as the reference adds (`sum` compensates rounding since Python 3.12)."""
    return round(100 * functools.reduce(operator.add, scores, 0.0) / len(scores), 2)


def _numpy_mean_in_percent(scores: Sequence[float]) -> float:
    """As the reference averages LongBench-E's buckets: numpy rounds 0.325 to 0.32, Python to 0.33."""
    return float(numpy.round(100 * numpy.mean(list(scores)), 2))


def _summary(scores: Sequence[float], mean: Callable[[Sequence[float]], float] = mean_in_percent) -> Summary:
    if not scores:
        return Summary(None, None, 0)
    score = mean(scores)
    stderr = float(100 * numpy.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None
    return Summary(score, stderr, len(scores))


def as_average(dataset: DatasetScore) -> Average:
    """A dataset by itself as a mean of one."""
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
