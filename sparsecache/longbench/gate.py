"""Decides whether a run is as good as a baseline within limits.

Raises UsageError if they are not comparable.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy

from sparsecache.errors import UsageError
from sparsecache.longbench.baseline import Baseline, BaselineDataset
from sparsecache.longbench.comparability import different, mismatches, speed_mismatches
from sparsecache.longbench.compare_tables import signed
from sparsecache.longbench.paired import bootstrap_means, confidence_interval
from sparsecache.longbench.score_types import GROUP_NAMES, mean_in_percent
from sparsecache.longbench.tasks import OWN

_MAX_SHOWN = 5


@dataclass(frozen=True)
class Limits:
    """The limits of a gate; None is not checked.

    max_drop: points of the mean over datasets; LongBench, LongBench v2, RULER and own tasks have a mean
    each.
    max_drop_dataset: points of each dataset and stratum. max_kept: share of past tokens, 0 to 1.
    min_speedup: decode speed divided by the baseline's. Raises UsageError for a value out of range.
    """

    max_drop: float = 1.0
    max_drop_dataset: float | None = None
    max_kept: float | None = None
    min_speedup: float | None = None

    def __post_init__(self) -> None:
        for name, value in ((field.name, getattr(self, field.name)) for field in fields(self)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"--{name} is {value}; it must be a number, 0 or more.")
        if self.max_kept is not None and self.max_kept > 1:
            raise UsageError(f"--max_kept is {self.max_kept:g}; it must be a share from 0 to 1 (0.2 is 20 %).")


@dataclass(frozen=True)
class Check:
    """The outcome of one check, and its description."""

    passed: bool
    text: str


@dataclass(frozen=True)
class Verdict:
    """The checks of a gate, and warnings about allowed differences."""

    checks: list[Check]
    warnings: list[str]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


@dataclass(frozen=True)
class _Pair:
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


def gate(
    run: Baseline, baseline: Baseline, limits: Limits, allow_partial: bool = False, allow_unlike: bool = False
) -> Verdict:
    """Check a run against a baseline over their common rows.

    Limits are checked against the rounded (two-decimal) values shown. Raises UsageError if the runs have no common
    rows, if rows are missing or failed (unless `allow_partial`), if more than the method differs (`comparability`;
    unless `allow_unlike`), and for a limit on a value that was not measured.
    """
    if run.e != baseline.e:
        raise UsageError(f"{baseline.name} is of LongBench{'-E' if baseline.e else ''}, {run.name} is not. {_E_ADVICE}")
    warnings = [*_partial(run, baseline, allow_partial), *_mismatches(run, baseline, limits, allow_unlike)]
    warnings += [f"{part}: the gate includes this difference." for part in different(run, baseline)]
    pairs = [_pair(stem, dataset, baseline.datasets.get(stem)) for stem, dataset in run.datasets.items()]
    pairs = [pair for pair in pairs if pair.run]
    if not pairs:
        raise UsageError(f"{run.name} and {baseline.name} have no row in common. Predict the same data with both.")
    strata = [pair for stem in run.datasets for pair in _strata(stem, run, baseline) if pair.run]
    return Verdict(list(_checks(run, baseline, pairs, strata, limits)), warnings)


_GROUPS = {name: f"datasets of {title}" for name, title in GROUP_NAMES.items()} | {
    "longbench": "datasets",
    OWN: "own tasks",
}
_E_ADVICE = "Compare two LongBench-E runs with --e, or two LongBench runs without it."


def check_complete(run: Baseline, allow_partial: bool = False, allow_unlike: bool = False) -> None:
    """Raise UsageError if a run cannot serve as a baseline: rows or its run.json are missing."""
    if run.unfinished and not allow_partial:
        raise UsageError(
            f"{run.name} is incomplete ({_listed(run.unfinished)}), so it cannot be a baseline. Predict the missing "
            f"rows, or save it anyway with --allow_partial."
        )
    if not run.identity and not allow_unlike:
        raise UsageError(
            f"{run.name} has no run.json, so later runs could not be checked for the same settings. Predict it with "
            f"longbench_pred.py, or save it anyway with --allow_unlike."
        )


def format_verdict(run: Baseline, baseline: Baseline, verdict: Verdict) -> Iterator[str]:
    """Yield the lines of a verdict, failed checks first."""
    yield f"{run.name} ({run.method}) against {baseline.name} ({baseline.method})"
    for check in sorted(verdict.checks, key=lambda check: check.passed):
        yield f"{'passed' if check.passed else 'FAILED'}  {check.text}"
    failed = sum(not check.passed for check in verdict.checks)
    yield f"FAILED: {failed} of {len(verdict.checks)} checks." if failed else "Passed."


def _partial(run: Baseline, baseline: Baseline, allow: bool) -> Iterator[str]:
    found = [f"{side.name} is incomplete ({_listed(side.unfinished)})" for side in (run, baseline) if side.unfinished]
    missing_rows = [
        f"{stem} {missing} of {len(dataset.scores)} rows"
        for stem, dataset in baseline.datasets.items()
        if (missing := len(dataset.scores.keys() - _scores(run, stem).keys()))
    ]
    if missing_rows:
        found.append(f"{run.name} lacks rows of the baseline ({_listed(missing_rows)})")
    if found and not allow:
        raise UsageError(
            f"{'; '.join(found)}. Predict the missing rows, or use only the common rows with --allow_partial."
        )
    yield from (f"{part}; only common rows are compared, and failed rows count 0.0." for part in found)


def _mismatches(run: Baseline, baseline: Baseline, limits: Limits, allow: bool) -> Iterator[str]:
    found = list(mismatches(run, baseline))
    if limits.min_speedup is not None:
        found += [f"{part}, for the speed" for part in speed_mismatches(run, baseline)]
    if found and not allow:
        raise UsageError(
            f"{run.name} and {baseline.name} differ in more than the method: {_listed(found, '; ')}. Predict both "
            f"with the same settings, save a new baseline with --save_baseline, or compare anyway with --allow_unlike."
        )
    yield from (f"{part}; allowed by --allow_unlike." for part in found)


def _checks(
    run: Baseline, baseline: Baseline, pairs: list[_Pair], strata: list[_Pair], limits: Limits
) -> Iterator[Check]:
    for group in dict.fromkeys(pair.group for pair in pairs):
        yield _mean_check([pair for pair in pairs if pair.group == group], limits.max_drop, _GROUPS.get(group, group))
    if limits.max_drop_dataset is not None:
        yield from _dataset_checks([*pairs, *strata], limits.max_drop_dataset)
    if limits.max_kept is not None:
        yield _kept_check(run, limits.max_kept)
    if limits.min_speedup is not None:
        yield _speed_check(run, baseline, limits.min_speedup)


def _mean_check(pairs: list[_Pair], allowed: float, what: str) -> Check:
    run, baseline = (round(sum(pair.scores[at] for pair in pairs) / len(pairs), 2) for at in (0, 1))
    text = _change(f"mean of {len(pairs)} {what}", run, baseline, allowed) + _interval(pairs)
    drop = round(baseline - run, 2)
    if drop > allowed:
        worst = sorted((pair for pair in pairs if pair.drop > 0), key=lambda pair: -pair.drop)
        text += f"; largest drops: {', '.join(f'{pair.stem} {pair.drop:.2f}' for pair in worst[:_MAX_SHOWN])}"
    return Check(drop <= allowed, text)


def _dataset_checks(pairs: list[_Pair], allowed: float) -> Iterator[Check]:
    passed = [pair for pair in pairs if pair.drop <= allowed]
    yield from (
        Check(False, _change(pair.stem, *pair.scores, allowed)) for pair in pairs if pair.drop > allowed
    )  # fmt: skip
    if passed:
        worst = max(passed, key=lambda pair: pair.drop)
        most = f"largest drop {worst.drop:.2f} ({worst.stem})" if worst.drop > 0 else "no drop"
        what = "datasets and strata" if any(" " in pair.stem for pair in pairs) else "datasets"
        yield Check(True, f"{len(passed)} of {len(pairs)} {what}: {most}, allowed {_short(allowed)}")


def _kept_check(run: Baseline, allowed: float) -> Check:
    if run.kept is None:
        raise UsageError(
            f"--max_kept {allowed:g} cannot be checked: no row of {run.name} reports a kept share (the full cache "
            f"reports none). Use a run of a sparse method, or omit --max_kept."
        )
    kept = round(run.kept, 4)
    text = f"kept {100 * kept:.2f}%, allowed {_short(100 * allowed)}%"
    return Check(
        kept <= allowed, text if kept <= allowed else f"{text}: {_short(100 * (kept - allowed))} points over the limit"
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
    return Check(passed, text if passed else f"{text}: {_short(required - speedup)} below the limit")


def _pair(
    stem: str, run: BaselineDataset, baseline: BaselineDataset | None, only: Collection[str] | None = None
) -> _Pair:
    known = baseline.scores if baseline else {}
    rows = [row for row in run.scores if row in known and (only is None or row in only)]
    return _Pair(stem, run.group, [run.scores[row] for row in rows], [known[row] for row in rows])


def _strata(stem: str, run: Baseline, baseline: Baseline) -> Iterator[_Pair]:
    """Yield the parts of a dataset of LongBench v2, by the run's own rows."""
    for name, rows in run.datasets[stem].strata.items():
        yield _pair(f"{stem} {name}", run.datasets[stem], baseline.datasets.get(stem), set(rows))


def _scores(side: Baseline, stem: str) -> dict[str, float]:
    return side.datasets[stem].scores if stem in side.datasets else {}


def _change(name: str, run: float, baseline: float, allowed: float) -> str:
    drop = round(baseline - run, 2)
    change = f"{'down' if drop > 0 else 'up'} {abs(drop):.2f}" if drop else "no change"
    text = f"{name}: {run:.2f}, baseline {baseline:.2f}, {change}, allowed drop {_short(allowed)}"
    return f"{text}: {_short(drop - allowed)} over the limit" if drop > allowed else text


def _interval(pairs: list[_Pair]) -> str:
    """Return the 95 % interval of the change; empty if a dataset has a single row."""
    if any(len(pair.run) < 2 for pair in pairs):
        return ""
    means = [
        bootstrap_means(100 * (numpy.array([pair.run]) - numpy.array([pair.baseline])).T, pair.stem, seed=0)
        for pair in pairs
    ]
    low, high = confidence_interval(numpy.mean(means, axis=0))
    return f" (95% interval of the change: {signed(low, 2)} to {signed(high, 2)})"


def _short(value: float) -> str:
    return f"{round(value, 4):g}"


def _listed(parts: Sequence[str], separator: str = ", ") -> str:
    more = [f"and {len(parts) - _MAX_SHOWN} more"] if len(parts) > _MAX_SHOWN else []
    return separator.join([*parts[:_MAX_SHOWN], *more])
