"""Scores prediction files with the official metrics, and reports what qualifies the scores."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecache.errors import UsageError
from sparsecache.longbench import metrics, rouge
from sparsecache.longbench.jsonl import get_number
from sparsecache.longbench.kept import aggregate_kept
from sparsecache.longbench.prediction_row import NEEDED
from sparsecache.longbench.reasoning import split_reasoning
from sparsecache.longbench.records import RunFolder, read_rows
from sparsecache.longbench.run_record import RUN_FILE
from sparsecache.longbench.score_types import DatasetScore, RowScore, RunScore
from sparsecache.longbench.tasks import Task, find_ruler_tasks, load_tasks, make_own_tasks
from sparsecache.longbench.text import chinese_words, choice_letter

Metric = Callable[[str, str, metrics.Context], float]


@dataclass(frozen=True)
class ScoringOptions:
    """Scoring options.

    The defaults reproduce published tables, except beyond the reference's recursion limit.

    Rows beyond that limit get their true score; `official_recursion` gives them 0.0, as the reference does.
    """

    edit_backend: str = metrics.EDIT_BACKENDS[0]
    official_recursion: bool = False
    rouge_score: bool = False
    allow_duplicates: bool = False


def load_metric(name: str, source: str = "configs/datasets.toml") -> Metric:
    """Return the metric of this name in metrics.py. Raises UsageError for an unknown name, which `source` gives."""
    known = {
        key: function
        for key, function in vars(metrics).items()
        if inspect.isfunction(function) and function.__module__ == metrics.__name__ and not key.startswith("_")
    }
    if name not in known:
        raise UsageError(f"There is no metric {name!r} ({source}). Metrics: {', '.join(sorted(known))}.")
    return known[name]


def score_run(
    folder: Path,
    e: bool = False,
    options: ScoringOptions = ScoringOptions(),
    own: Mapping[str, Task] | None = None,
) -> RunScore:
    """Score every prediction file of a folder.

    own: tasks of one's own; by default those that run.json records.

    With `e`, score the LongBench-E files `<dataset>_e.jsonl`; a folder without run.json may name them
    `<dataset>.jsonl`. Raises UsageError for a folder without such files, an unknown dataset, an invalid row, and a
    repeated `_id`.
    """
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}. Give --model and --name of a run, or the path of its folder.")
    run = RunFolder(folder).load()
    expected = run.expected_rows
    ruler = find_ruler_tasks([*expected, *(path.stem for path in folder.glob("*.jsonl"))])
    tasks = {**load_tasks(), **ruler, **make_own_tasks(run.tasks, str(folder / RUN_FILE)), **(own or {})}
    scores = [
        score_file(path, task, e, expected.get(task.file_stem(e)), options, run.deviations(task.file_stem(e)))
        for task, path in _files(folder, tasks, e, foreign=not expected)
    ]
    found = {score.task.file_stem(e) for score in scores}
    missing = [task for task in tasks.values() if task.file_stem(e) in expected.keys() - found]
    scores += [DatasetScore(task, e, [], expected[task.file_stem(e)], ["its file is missing"]) for task in missing]
    return RunScore(folder, e, scores, run)


def score_file(
    path: Path,
    task: Task,
    e: bool,
    expected: int | None,
    options: ScoringOptions,
    deviations: Sequence[str] = (),
) -> DatasetScore:
    """Score one prediction file.

    `expected`: number of rows in run.json; None means the published number. `deviations`: from the protocol.
    """
    rows = list(read_rows(path, needed=NEEDED))
    warnings = [f"not the protocol: {deviation}" for deviation in deviations]
    warnings += _file_warnings(path, rows, task, e, options.allow_duplicates)
    if expected is None and (expected := task.published_rows(e)) is not None:
        warnings.append("run.json does not record the number of rows, so the published number is expected")
    all_classes = rows[-1].get("all_classes") if rows else None  # the reference uses those of the last row
    scored = [_score_row(row, task, e, all_classes, options) for row in rows]
    rouge_values = _rouge_score(rows, task) if options.rouge_score and "rouge_l" in task.metric and rows else None
    result = DatasetScore(task, e, scored, expected, warnings, rouge_values, aggregate_kept(rows), rows)
    warnings.extend(_row_warnings(result))
    return result


def _files(folder: Path, known: Mapping[str, Task], e: bool, foreign: bool) -> list[tuple[Task, Path]]:
    tasks = {
        task.file_stem(flag): (task, flag)
        for task in known.values()
        for flag in (False, True)
        if not flag or task.rows_e is not None
    }
    paths = sorted(folder.glob("*.jsonl"))
    unknown = [path.name for path in paths if path.stem not in tasks]
    if unknown:
        raise UsageError(
            f"{folder} holds files of unknown datasets: {', '.join(unknown)}. Datasets: "
            f"{', '.join(known)}. Move them away, or describe them in a file for --tasks."
        )
    order = list(tasks)
    found = [(*tasks[path.stem], path) for path in sorted(paths, key=lambda path: order.index(path.stem))]
    if not found:
        raise UsageError(f"{folder} holds no <dataset>.jsonl file, so there is nothing to score.")
    chosen = [(task, path) for task, flag, path in found if flag == e]
    if not chosen and e and foreign:
        chosen = [(task, path) for task, _, path in found if task.rows_e is not None]
    if not chosen:
        hint = "none belongs to LongBench-E" if e else "all are LongBench-E's (add --e)"
        raise UsageError(f"{folder} holds {len(found)} prediction files, but {hint}.")
    return chosen


def _file_warnings(path: Path, rows: list[dict[str, Any]], task: Task, e: bool, allow_duplicates: bool) -> list[str]:
    """Return warnings about a file. Raises UsageError for repeated `_id`s unless allowed."""
    warnings = []
    ids = [str(row["_id"]) for row in rows if row.get("_id") is not None]
    repeated = len(ids) - len(set(ids))
    if repeated and not allow_duplicates:
        raise UsageError(
            f"{path} repeats {repeated} _ids, so rows would count twice. Delete the repeats, or count them, as the "
            f"official scorer does, with --allow_duplicates."
        )
    if repeated:
        warnings.append(f"{repeated} rows repeat an _id and count again")
    if len(ids) < len(rows):
        warnings.append(f"{len(rows) - len(ids)} rows have no _id, so repeats cannot be detected")
    if task.benchmark != "longbench_v2" and any(get_number(row, "length") is None for row in rows):
        warnings.append("rows have no length" + (" and are in no bucket" if e else ""))
    return warnings


def _row_warnings(result: DatasetScore) -> list[str]:
    warnings = []
    for flag, words in (("empty", "are empty"), ("metric_error", "could not be scored and count 0.0")):
        if result.count(flag) > 0.01 * len(result.rows):
            warnings.append(f"{result.count(flag)} of {len(result.rows)} predictions {words}")
    if result.count("no_letter"):
        warnings.append(f"{result.count('no_letter')} of {len(result.rows)} predictions give no letter and count 0.0")
    if result.count("recursion_exceeded"):
        warnings.append(
            f"{result.count('recursion_exceeded')} rows get 0.0 from the reference scorer (recursion limit)"
        )
    if result.count("error_row"):
        warnings.append(f"{result.count('error_row')} error rows count 0.0; run the prediction again to retry them")
    if result.expected is not None and len(result.rows) > result.expected:
        warnings.append("more rows than expected: appended re-runs?")
    return warnings


def _score_row(row: dict[str, Any], task: Task, e: bool, all_classes: Any, options: ScoringOptions) -> RowScore:
    context = metrics.Context(all_classes, options.edit_backend, options.official_recursion)
    text = split_reasoning(row["pred"])
    unclosed = text.unclosed or row.get("unclosed_think") is True
    prediction = _scored_text(row["pred"], task)
    metric = load_metric(task.metric, task.source)
    scores, failed = [0.0], False
    for answer in row["answers"]:
        try:
            scores.append(metric(prediction, answer, context))
        except (ValueError, IndexError, TypeError, ZeroDivisionError):
            failed = True  # counts 0.0, as in the reference
    error_row = "error" in row
    empty = not text.answer.strip() and not error_row and not unclosed
    return RowScore(
        score=sum(scores) / max(1, len(row["answers"])) if task.metric in metrics.MEAN_METRICS else max(scores),
        length=get_number(row, "length"),
        empty=empty,
        metric_error=failed and not empty and not error_row and not unclosed,
        error_row=error_row,
        recursion_exceeded=context.recursion_exceeded,
        ended_by_length=not error_row and (unclosed or row.get("finish_reason") == "length"),
        no_letter=task.metric == "choice" and not error_row and choice_letter(prediction) is None,
        strata=_strata(row) if task.benchmark == "longbench_v2" else (),
    )


def _strata(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the strata of a row, as the official code of LongBench v2 sorts unknown values."""
    length = row.get("length")
    return (
        "easy" if row.get("difficulty") == "easy" else "hard",
        length if length in ("short", "medium") else "long",
    )


def _scored_text(prediction: str, task: Task) -> str:
    answer = split_reasoning(prediction).answer
    return answer.lstrip("\n").split("\n")[0] if task.first_line else answer


def _rouge_score(rows: list[dict[str, Any]], task: Task) -> dict[str, float]:
    """Return the F values in percent that the package rouge-score gives."""
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
    """Return rouge-score's ROUGE-L in linear memory; the package takes memory per pair of words."""
    common = rouge.common_length(prediction, answer)
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


class _JiebaTokenizer:
    """A tokenizer for rouge-score, whose default one drops Chinese characters."""

    def tokenize(self, text: str) -> list[str]:
        return chinese_words(text)
