"""Runs side by side over the rows they share: scores, differences to the first run, and what each run cost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy

from sparsecache.longbench.comparison import ComparedRun, Comparison, Entry, Kind, Line, Versus
from sparsecache.longbench.jsonl import figure
from sparsecache.longbench.paired import RESAMPLES, Floats, common_rows, interval, remarks, resampled_means
from sparsecache.longbench.report import LEAST_S, decode_speed
from sparsecache.longbench.runs import short_names
from sparsecache.longbench.scores import Average, DatasetScore, RowScore, RunScore, as_average
from sparsecache.longbench.sessions import devices

FEW_ROWS = 20  # below it, a bootstrap interval is too narrow


@dataclass(frozen=True)
class _Paired:
    """A dataset's rows in all runs, and per run beside the first: mean differences in percent and resampled ones."""

    datasets: tuple[DatasetScore, ...]
    differences: Floats  # [runs - 1]
    resampled: Floats  # [resamples, runs - 1]


def compare(runs: Sequence[RunScore], seed: int = 0, resamples: int = RESAMPLES) -> Comparison:
    """Compares two or more runs, rows matched by `_id` within each dataset.

    Error rows count 0.0, as in the scorer. Rows are resampled within datasets, together for all runs. Raises
    UsageError when there is nothing to compare (see common_rows), ValueError for fewer than two runs.
    """
    if len(runs) < 2 or len({run.e for run in runs}) > 1:
        raise ValueError("compare takes two or more runs, all of them of LongBench or all of LongBench-E.")
    common = common_rows(runs)
    paired = {
        parts[0].task.name: _pair(parts, seed, resamples)
        for parts in zip(*(run.datasets for run in common.runs), strict=True)
    }
    names = short_names([run.folder for run in runs])
    compared = tuple(
        ComparedRun(
            name=name,
            folder=run.folder,
            complete=run.complete,
            rows=sum(len(dataset.rows) for dataset in run.datasets),
            left_out=left_out,
            kept=run.averages["flat_mean"].kept,
            decode=decode_speed(run.run),
            devices=devices(run.run),
            record=run.run,
        )
        for run, name, left_out in zip(runs, names, common.left_out, strict=True)
    )
    lines = tuple(_lines(common.runs, paired))
    notes = (*remarks(runs, common), *_notes(compared, common.runs))
    return Comparison(compared, lines, notes, runs[0].e, seed, resamples)


def _pair(parts: tuple[DatasetScore, ...], seed: int, resamples: int) -> _Paired:
    scores = 100 * numpy.array([[row.score for row in part.rows] for part in parts]).T
    differences = scores[:, 1:] - scores[:, :1]
    stem = parts[0].task.file_stem(parts[0].e)
    return _Paired(parts, differences.mean(axis=0), resampled_means(differences, stem, seed, resamples))


def _lines(runs: Sequence[RunScore], paired: dict[str, _Paired]) -> Iterator[Line]:
    for name, pair in paired.items():
        stem = pair.datasets[0].task.file_stem(runs[0].e)
        yield _line(stem, "dataset", [as_average(part) for part in pair.datasets], {name: 1.0}, paired)
    weights = {name: _weights(runs[0], name) for name in paired}
    kinds: list[tuple[Kind, list[dict[str, Average]]]] = [
        ("category", [run.categories for run in runs]),
        ("average", [run.averages for run in runs]),
    ]
    for kind, means in kinds:
        for name in (name for name, mean in means[0].items() if mean.datasets):
            shares = {dataset: share for dataset, by in weights.items() if (share := by[kind, name])}
            yield _line(name, kind, [mean[name] for mean in means], shares, paired)


def _line(
    name: str, kind: Kind, means: Sequence[Average], weights: dict[str, float], paired: dict[str, _Paired]
) -> Line:
    parts = [paired[dataset] for dataset in weights]
    scores = [mean.score or 0.0 for mean in means]
    entries = tuple(
        Entry(
            score=scores[at],
            stderr=mean.stderr,
            kept=mean.kept,
            tokens_per_s=_tokens_per_s([part.datasets[at] for part in parts]),
            errors=sum(part.datasets[at].count("error_row") for part in parts),
            best=scores[at] == max(scores),
            versus=_versus(parts, list(weights.values()), at) if at else None,
        )
        for at, mean in enumerate(means)
    )
    return Line(name, kind, means[0].n, means[0].datasets, means[0].of, entries)


def _versus(parts: Sequence[_Paired], weights: Sequence[float], run: int) -> Versus:
    pairs = [
        pair
        for part in parts
        for pair in zip(part.datasets[0].rows, part.datasets[run].rows, strict=True)
    ]  # fmt: skip
    texts = [
        mine["pred"] != theirs["pred"]
        for part in parts
        for mine, theirs in zip(part.datasets[0].records, part.datasets[run].records, strict=True)
    ]
    wins, losses = (sum(sign * (other.score - first.score) > 0 for first, other in pairs) for sign in (1, -1))
    means = sum(weight * part.resampled[:, run - 1] for part, weight in zip(parts, weights, strict=True))
    known = all(len(part.datasets[0].rows) > 1 for part in parts)
    return Versus(
        difference=float(sum(w * part.differences[run - 1] for part, w in zip(parts, weights, strict=True))),
        interval=interval(numpy.asarray(means)) if known else None,
        wins=wins,
        losses=losses,
        ties=len(pairs) - wins - losses,
        changed=sum(texts),
    )


def _weights(run: RunScore, name: str) -> dict[tuple[str, str], float]:
    """What a dataset weighs in each category and average: the scorer's own answer if it alone had 100, others 0."""
    perfect = replace(
        run,
        datasets=[
            replace(dataset, rows=[RowScore(float(dataset.task.name == name), None, False, False, False, False)])
            for dataset in run.datasets
        ],
    )
    means = [("category", perfect.categories), ("average", perfect.averages)]
    return {(kind, key): (mean.score or 0.0) / 100 for kind, by_name in means for key, mean in by_name.items()}


def _tokens_per_s(datasets: Sequence[DatasetScore]) -> float | None:
    tokens = seconds = 0.0
    for record in (record for dataset in datasets for record in dataset.records):
        new, taken = figure(record, "new_tokens"), figure(record, "decode_s")
        if new is not None and taken is not None and taken > 0:
            tokens, seconds = tokens + max(new - 1, 0), seconds + taken
    return tokens / seconds if seconds >= LEAST_S else None


def _notes(runs: Sequence[ComparedRun], common: Sequence[RunScore]) -> Iterator[str]:
    rows = sum(len(dataset.rows) for dataset in common[0].datasets)
    for run, part in zip(runs, common, strict=True):
        errors = sum(dataset.count("error_row") for dataset in part.datasets)
        if errors:
            yield f"{errors} of these rows failed in {run.name} and count 0.0 there; predict again to retry them."
    for run, part in zip(runs[1:], common[1:], strict=True):
        if other := _other_prompts(common[0], part):
            yield f"{run.name} was asked other prompts than {runs[0].name} in {other} of {rows} rows."
    few = [dataset.task.file_stem(dataset.e) for dataset in common[0].datasets if len(dataset.rows) < FEW_ROWS]
    if few:
        whom = "every dataset" if len(few) == len(common[0].datasets) else ", ".join(few)
        yield f"Fewer than {FEW_ROWS} rows, so the intervals are too narrow: {whom}."


def _other_prompts(first: RunScore, other: RunScore) -> int:
    """Rows that were asked with another prompt, as far as both sides say."""
    return sum(
        _other_prompt(mine, theirs)
        for one, two in zip(first.datasets, other.datasets, strict=True)
        for mine, theirs in zip(one.records, two.records, strict=True)
    )


def _other_prompt(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two rows had other prompts: by token ids where both rows say, else by text; False if unknown."""
    for key in ("prompt_ids_sha256", "prompt_sha256"):
        if key in mine and key in theirs:
            return bool(mine[key] != theirs[key])
    return False
