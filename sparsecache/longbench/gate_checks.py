"""The checks of a gate: limits on the drop of scores, on the kept share and on the speed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy

from sparsecache.errors import UsageError
from sparsecache.longbench.baseline import Baseline
from sparsecache.longbench.compare_tables import signed
from sparsecache.longbench.paired import MIN_ROWS, bootstrap_means, confidence_interval
from sparsecache.longbench.score_types import GROUP_NAMES, mean_in_percent
from sparsecache.longbench.tasks import OWN

_MAX_SHOWN = 5  # datasets in a sentence


@dataclass(frozen=True)
class Limits:
    """The limits of a gate; None is not checked.

    max_drop: points of the mean over datasets; each of GROUP_NAMES has a mean.
    non_inferior: points that the whole 95 % interval of the mean's change must stay within, below.
    max_drop_dataset: points of each dataset and stratum. max_kept: share of past tokens, 0 to 1.
    min_speedup: decode speed divided by the baseline's. Raises UsageError for a value out of range.
    """

    max_drop: float | None = 1.0
    max_drop_dataset: float | None = None
    max_kept: float | None = None
    min_speedup: float | None = None
    non_inferior: float | None = None

    def __post_init__(self) -> None:
        for name, value in ((field.name, getattr(self, field.name)) for field in fields(self)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"--{name} is {value}; it must be a number, 0 or more.")
        if self.max_kept is not None and self.max_kept > 1:
            raise UsageError(f"--max_kept is {self.max_kept:g}; it must be a share from 0 to 1 (0.2 is 20 %).")


@dataclass(frozen=True)
class Check:
    """The outcome of one check, its name and its description."""

    passed: bool
    name: str
    text: str


@dataclass(frozen=True)
class Pair:
    """The row scores of one dataset or stratum in both runs, over their common rows. group: `Task.group`."""

    stem: str
    group: str
    run: list[float]
    baseline: list[float]

    @property
    def scores(self) -> tuple[float, float]:
        return mean_in_percent(self.run), mean_in_percent(self.baseline)

    @property
    def drop(self) -> float:
        run, baseline = self.scores
        return round(baseline - run, 2)


_GROUPS = {name: f"datasets of {title}" for name, title in GROUP_NAMES.items()} | {
    "longbench": "datasets", OWN: "own tasks"
}  # fmt: skip


def make_checks(
    run: Baseline, baseline: Baseline, pairs: list[Pair], strata: list[Pair], limits: Limits
) -> Iterator[Check]:
    """Yield the check of every limit that is set; pairs: of datasets; strata: of their parts.

    Raises UsageError for a limit on a value that was not measured, and if the baseline scores 0 in all rows of a group.
    """
    for group in dict.fromkeys(pair.group for pair in pairs):
        members, what = [pair for pair in pairs if pair.group == group], _GROUPS.get(group, group)
        if not any(score for pair in members for score in pair.baseline):
            named = ", ".join(pair.stem for pair in members)
            raise UsageError(
                f"No verdict: {baseline.name} scores 0 in all compared rows of {named}, so no drop can show. Choose "
                f"datasets that the model can answer, or a larger model."
            )
        if limits.max_drop is not None:
            yield _mean_check(members, limits.max_drop, what)
        if limits.non_inferior is not None:
            yield _non_inferior_check(members, limits.non_inferior, what)
    if limits.max_drop_dataset is not None:
        yield from _dataset_checks([*pairs, *strata], limits.max_drop_dataset)
    if limits.max_kept is not None:
        yield _kept_check(run, limits.max_kept)
    if limits.min_speedup is not None:
        yield _speed_check(run, baseline, limits.min_speedup)


def _means(pairs: list[Pair]) -> tuple[float, float]:
    """Return the mean scores of run and baseline over datasets."""
    run, baseline = (round(sum(pair.scores[at] for pair in pairs) / len(pairs), 2) for at in (0, 1))
    return run, baseline


def _mean_check(pairs: list[Pair], allowed: float, what: str) -> Check:
    run, baseline = _means(pairs)
    name = f"mean of {len(pairs)} {what}"
    text = _change(name, run, baseline, allowed)
    if interval := _interval(pairs):
        text += f" (95% interval of the change: {_range(interval)})"
    drop = round(baseline - run, 2)
    if drop > allowed:
        worst = sorted((pair for pair in pairs if pair.drop > 0), key=lambda pair: -pair.drop)
        text += f"; largest drops: {', '.join(f'{pair.stem} {pair.drop:.2f}' for pair in worst[:_MAX_SHOWN])}"
    return Check(drop <= allowed, name, text)


def _non_inferior_check(pairs: list[Pair], margin: float, what: str) -> Check:
    """Check the lower end of the 95 % interval of the change. Raises UsageError where there is no interval."""
    name, interval = f"non-inferiority of the mean of {len(pairs)} {what}", _interval(pairs)
    if interval is None:
        raise UsageError(
            f"--non_inferior {margin:g} cannot be checked: an interval needs {MIN_ROWS} rows or more, and two or more "
            f"in each dataset. Predict more rows, or use --max_drop."
        )
    run, baseline = _means(pairs)
    passed = round(interval[0], 2) >= -margin
    text = (
        f"{name}: {run:.2f}, baseline {baseline:.2f}, 95% interval of the change {_range(interval)}, allowed from "
        f"{signed(-margin, 2)}"
    )
    return Check(passed, name, text if passed else f"{text}: the interval reaches {-interval[0] - margin:.2f} below it")


def _dataset_checks(pairs: list[Pair], allowed: float) -> Iterator[Check]:
    passed = [pair for pair in pairs if pair.drop <= allowed]
    yield from (
        Check(False, pair.stem, _change(pair.stem, *pair.scores, allowed)) for pair in pairs if pair.drop > allowed
    )  # fmt: skip
    if passed:
        worst = max(passed, key=lambda pair: pair.drop)
        most = f"largest drop {worst.drop:.2f} ({worst.stem})" if worst.drop > 0 else "no drop"
        what = "datasets and strata" if any(" " in pair.stem for pair in pairs) else "datasets"
        yield Check(
            True,
            "datasets within the limit",
            f"{len(passed)} of {len(pairs)} {what}: {most}, allowed {_short(allowed)}",
        )


def _kept_check(run: Baseline, allowed: float) -> Check:
    if run.kept is None:
        raise UsageError(
            f"--max_kept {allowed:g} cannot be checked: no row of {run.name} reports a kept share (the full cache "
            f"reports none). Use a run of a sparse method, or omit --max_kept."
        )
    kept = round(run.kept, 4)
    text = f"kept {100 * kept:.2f}%, allowed {_short(100 * allowed)}%"
    return Check(
        kept <= allowed,
        "kept",
        text if kept <= allowed else f"{text}: {_short(100 * (kept - allowed))} points over the limit",
    )


def _speed_check(run: Baseline, baseline: Baseline, required: float) -> Check:
    for side in (run, baseline):
        if not side.tokens_per_s:
            raise UsageError(
                f"--min_speedup {required:g} cannot be checked: {side.name} has no decode speed. Predict it again, or "
                f"omit --min_speedup."
            )
    speed, reference = run.tokens_per_s or 0.0, baseline.tokens_per_s or 1.0
    speedup = round(speed / reference, 2)
    text = f"decode {speed:.1f} tokens/s, baseline {reference:.1f}: speedup {speedup:.2f}, required {_short(required)}"
    passed = speedup >= required
    return Check(passed, "speedup", text if passed else f"{text}: {_short(required - speedup)} below the limit")


def _change(name: str, run: float, baseline: float, allowed: float) -> str:
    drop = round(baseline - run, 2)
    change = f"{'down' if drop > 0 else 'up'} {abs(drop):.2f}" if drop else "no change"
    text = f"{name}: {run:.2f}, baseline {baseline:.2f}, {change}, allowed drop {_short(allowed)}"
    return f"{text}: {_short(drop - allowed)} over the limit" if drop > allowed else text


def _interval(pairs: list[Pair]) -> tuple[float, float] | None:
    """Return the 95 % interval of the change; None with fewer than MIN_ROWS rows, or a dataset of a single row."""
    if any(len(pair.run) < 2 for pair in pairs) or sum(len(pair.run) for pair in pairs) < MIN_ROWS:
        return None
    means = [
        bootstrap_means(100 * (numpy.array([pair.run]) - numpy.array([pair.baseline])).T, pair.stem, seed=0)
        for pair in pairs
    ]
    return confidence_interval(numpy.mean(means, axis=0))


def _range(interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{signed(low, 2)} to {signed(high, 2)}"


def _short(value: float) -> str:
    return f"{round(value, 4):g}"
