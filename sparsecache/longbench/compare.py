"""Compares runs over their common rows: scores, differences, speed and memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy

from sparsecache.longbench.comparison import ComparedRun, Comparison, Difference, Entry, Group, Kind
from sparsecache.longbench.costs import CacheCosts, cache_costs
from sparsecache.longbench.jsonl import get_number
from sparsecache.longbench.paired import (
    MIN_ROWS,
    RESAMPLES,
    Floats,
    bootstrap_means,
    common_rows,
    common_rows_notes,
    confidence_interval,
    failed_rows_notes,
    few_rows_notes,
)
from sparsecache.longbench.report import MIN_SECONDS, decode_speed
from sparsecache.longbench.runs import run_names
from sparsecache.longbench.score_types import Average, DatasetScore, RowScore, RunScore, as_average
from sparsecache.longbench.sessions import devices
from sparsecache.longbench.subjects import subject


@dataclass(frozen=True)
class _PairedDataset:
    """A dataset in all runs, with mean and resampled differences to the first run in percent."""

    datasets: tuple[DatasetScore, ...]
    differences: Floats  # [runs - 1]
    resampled: Floats  # [resamples, runs - 1]


def compare(runs: Sequence[RunScore], seed: int = 0, resamples: int = RESAMPLES) -> Comparison:
    """Compare two or more runs. Rows are matched by `_id` within each dataset.

    Error rows count 0.0, as in the scorer. The bootstrap resamples rows within datasets, the same ones for all runs.
    Raises UsageError without common rows (`common_rows`), and ValueError for fewer than two runs.
    """
    if len(runs) < 2 or len({run.e for run in runs}) > 1:
        raise ValueError("compare takes two or more runs, all of them of LongBench or all of LongBench-E.")
    common = common_rows(runs)
    paired = {
        parts[0].task.name: _pair(parts, seed, resamples)
        for parts in zip(*(run.datasets for run in common.runs), strict=True)
    }
    names = run_names(runs)
    compared = tuple(
        ComparedRun(
            name=name,
            folder=run.folder,
            complete=run.complete,
            rows=run.num_rows,
            left_out=left_out,
            kept=run.headline.kept,
            decode=decode_speed(run.run),
            cache=cache_costs(run),
            devices=devices(run.run),
            record=run.run,
        )
        for run, name, left_out in zip(runs, names, common.left_out, strict=True)
    )
    costs = [run.cache for run in compared]
    groups = tuple(_groups(common.runs, costs, paired, seed, resamples))
    notes = (*common_rows_notes(runs, common), *_notes(compared, common.runs))
    return Comparison(compared, groups, subject(common.runs), notes, runs[0].e, seed, resamples)


def _pair(parts: tuple[DatasetScore, ...], seed: int, resamples: int) -> _PairedDataset:
    scores = 100 * numpy.array([[row.score for row in part.rows] for part in parts]).T
    differences = scores[:, 1:] - scores[:, :1]
    stem = parts[0].task.file_stem(parts[0].e)
    return _PairedDataset(parts, differences.mean(axis=0), bootstrap_means(differences, stem, seed, resamples))


def _groups(
    runs: Sequence[RunScore],
    costs: Sequence[CacheCosts],
    paired: dict[str, _PairedDataset],
    seed: int,
    resamples: int,
) -> Iterator[Group]:
    for name, pair in paired.items():
        stem = pair.datasets[0].task.file_stem(runs[0].e)
        yield _group(stem, "dataset", [as_average(part) for part in pair.datasets], costs, {name: 1.0}, paired)
    for pair in paired.values():
        for name, part in _strata(pair, seed, resamples):
            yield _group(
                name, "stratum", [as_average(each) for each in part.datasets], costs, {name: 1.0}, {name: part}
            )
    weights = {name: _weights(runs[0], name) for name in paired}
    kinds: list[tuple[Kind, list[dict[str, Average]]]] = [
        ("category", [run.categories for run in runs]),
        ("average", [run.averages for run in runs]),
    ]
    for kind, means in kinds:
        for name in (name for name, mean in means[0].items() if mean.datasets):
            in_group = {dataset: weight for dataset, by in weights.items() if (weight := by[kind, name])}
            yield _group(name, kind, [mean[name] for mean in means], costs, in_group, paired)


def _strata(pair: _PairedDataset, seed: int, resamples: int) -> Iterator[tuple[str, _PairedDataset]]:
    """Yield the strata of LongBench v2 with their names, by the first run's rows."""
    first = pair.datasets[0]
    for stratum in first.strata:
        places = [at for at, row in enumerate(first.rows) if stratum in row.strata]
        parts = tuple(dataset.only(places) for dataset in pair.datasets)
        yield f"{first.task.file_stem(first.e)} {stratum}", _pair(parts, seed, resamples)


def _group(
    name: str,
    kind: Kind,
    means: Sequence[Average],
    costs: Sequence[CacheCosts],
    weights: dict[str, float],
    paired: dict[str, _PairedDataset],
) -> Group:
    parts = [paired[dataset] for dataset in weights]
    scores = [mean.score or 0.0 for mean in means]
    entries = tuple(
        Entry(
            score=scores[at],
            stderr=mean.stderr,
            kept=mean.kept,
            model_share=costs[at].model_share(mean.kept),
            tokens_per_s=_tokens_per_s([part.datasets[at] for part in parts]),
            errors=sum(part.datasets[at].count("error_row") for part in parts),
            best=scores[at] == max(scores) > min(scores),
            difference=_difference(parts, list(weights.values()), at) if at else None,
        )
        for at, mean in enumerate(means)
    )
    return Group(name, kind, means[0].n, means[0].datasets, means[0].of_datasets, entries)


def _difference(parts: Sequence[_PairedDataset], weights: Sequence[float], run: int) -> Difference:
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
    known = len(pairs) >= MIN_ROWS and all(len(part.datasets[0].rows) > 1 for part in parts)
    return Difference(
        mean=float(sum(w * part.differences[run - 1] for part, w in zip(parts, weights, strict=True))),
        interval=confidence_interval(numpy.asarray(means)) if known else None,
        wins=wins,
        losses=losses,
        ties=len(pairs) - wins - losses,
        changed=sum(texts),
    )


def _weights(run: RunScore, name: str) -> dict[tuple[str, str], float]:
    """Return a dataset's weight in each category and average: their score if it alone scores 1."""
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
        new, taken = get_number(record, "new_tokens"), get_number(record, "decode_s")
        if new is not None and taken is not None and taken > 0:
            tokens, seconds = tokens + max(new - 1, 0), seconds + taken
    return tokens / seconds if seconds >= MIN_SECONDS else None


def _notes(runs: Sequence[ComparedRun], common: Sequence[RunScore]) -> Iterator[str]:
    rows = common[0].num_rows
    answered = [row.score for dataset in common[0].datasets for row in dataset.rows if not row.error_row]
    if answered and not any(answered):
        yield (
            f"Warning: {runs[0].name} scores 0 in all rows, so this comparison cannot show a loss. Choose datasets "
            f"that the model can answer, or a larger model."
        )
    yield from failed_rows_notes(common)
    for run, part in zip(runs, common, strict=True):
        for dataset in part.datasets:
            stem = dataset.task.file_stem(dataset.e)
            yield from (f"{run.name}, {stem}: not the protocol: {each}." for each in run.record.deviations(stem))
    for run, part in zip(runs[1:], common[1:], strict=True):
        if different := _different_prompts(common[0], part):
            yield f"{run.name} and {runs[0].name} had different prompts in {different} of {rows} rows."
    yield from few_rows_notes(common[0])


def _different_prompts(first: RunScore, other: RunScore) -> int:
    """Return the number of rows whose prompts are known to differ."""
    return sum(
        _prompts_differ(mine, theirs)
        for one, two in zip(first.datasets, other.datasets, strict=True)
        for mine, theirs in zip(one.records, two.records, strict=True)
    )


def _prompts_differ(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Return whether prompts differ: by token ids if known, else by text; False if unknown."""
    for key in ("prompt_ids_sha256", "prompt_sha256"):
        if key in mine and key in theirs:
            return bool(mine[key] != theirs[key])
    return False
