"""Whether a run is good enough beside a baseline: checks that pass or fail, or a refusal where they say nothing."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy

from sparsecache.errors import UsageError
from sparsecache.longbench.baseline import Baseline, BaselineDataset
from sparsecache.longbench.comparability import different, mismatches, speed_mismatches
from sparsecache.longbench.compare_tables import signed
from sparsecache.longbench.paired import interval, resampled_means
from sparsecache.longbench.scores import mean_in_percent

_SHOWN = 5


@dataclass(frozen=True)
class Limits:
    """What a run may cost: points of the mean over datasets and of any one of them, kept share, decode speed.

    max_kept is a share from 0 to 1; min_speedup is times the baseline's speed. None: not checked. Raises UsageError
    for anything but a number from 0 on.
    """

    max_drop: float = 1.0
    max_drop_dataset: float | None = None
    max_kept: float | None = None
    min_speedup: float | None = None

    def __post_init__(self) -> None:
        for name, value in ((field.name, getattr(self, field.name)) for field in fields(self)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"--{name} {value} is no limit. Give a number from 0 on.")
        if self.max_kept is not None and self.max_kept > 1:
            raise UsageError(f"--max_kept {self.max_kept:g} is no share. Give one from 0 to 1: 0.2 is 20 %.")


@dataclass(frozen=True)
class Check:
    """One thing that was checked, and in words what came of it."""

    passed: bool
    text: str


@dataclass(frozen=True)
class Verdict:
    """All checks, and warnings on what was let through."""

    checks: list[Check]
    warnings: list[str]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


@dataclass(frozen=True)
class _Pair:
    """One dataset's scores on both sides over the shared rows, rounded as the official scorer does."""

    stem: str
    mine: list[float]
    theirs: list[float]

    @property
    def scores(self) -> tuple[float, float]:
        return mean_in_percent(self.mine), mean_in_percent(self.theirs)

    @property
    def drop(self) -> float:
        mine, theirs = self.scores
        return round(theirs - mine, 2)


def gate(
    run: Baseline, baseline: Baseline, limits: Limits, allow_partial: bool = False, allow_unlike: bool = False
) -> Verdict:
    """Checks a run against a baseline over the rows that both have.

    What is judged is what is printed: scores and drops have two digits, shares of past tokens two of a percent,
    speedups two. Raises UsageError where a verdict would mean nothing: no row in common; rows of either side missing
    or failed (unless allow_partial); unlike things (see likeness; unless allow_unlike); a limit on something that
    was not measured.
    """
    if run.e != baseline.e:
        raise UsageError(f"{baseline.name} is of LongBench{'-E' if baseline.e else ''}, {run.name} is not. {_E_ADVICE}")
    warnings = [*_partial(run, baseline, allow_partial), *_mismatches(run, baseline, limits, allow_unlike)]
    warnings += [f"{part}: this may differ, and is part of what is gated." for part in different(run, baseline)]
    pairs = [_pair(stem, dataset, baseline.datasets.get(stem)) for stem, dataset in run.datasets.items()]
    pairs = [pair for pair in pairs if pair.mine]
    if not pairs:
        raise UsageError(f"{run.name} and {baseline.name} have no row in common. Predict the same data with both.")
    return Verdict(list(_checks(run, baseline, pairs, limits)), warnings)


_E_ADVICE = "Give --e for LongBench-E and leave it out for LongBench, and gate like against like."


def check_savable(run: Baseline, allow_partial: bool = False, allow_unlike: bool = False) -> None:
    """Raises UsageError if a run is not fit to be a baseline: not whole, or made nobody knows how."""
    if run.unfinished and not allow_partial:
        raise UsageError(
            f"{run.name} is not whole ({_some(run.unfinished)}), so it is no baseline yet. Predict what is missing, or "
            f"save it as it is with --allow_partial."
        )
    if not run.identity and not allow_unlike:
        raise UsageError(
            f"No run.json says how {run.name} was made, so a later gate could not tell like from unlike. Predict it "
            f"with longbench_pred.py, or save it all the same with --allow_unlike."
        )


def lines(run: Baseline, baseline: Baseline, verdict: Verdict) -> Iterator[str]:
    """The verdict as it is printed."""
    yield f"{run.name} ({run.method}) against {baseline.name} ({baseline.method})"
    for check in sorted(verdict.checks, key=lambda check: check.passed):
        yield f"{'passed' if check.passed else 'FAILED'}  {check.text}"
    failed = sum(not check.passed for check in verdict.checks)
    yield f"FAILED: {failed} of {len(verdict.checks)} checks." if failed else "Passed."


def _partial(run: Baseline, baseline: Baseline, allow: bool) -> Iterator[str]:
    found = [f"{side.name} is not whole ({_some(side.unfinished)})" for side in (run, baseline) if side.unfinished]
    lacking = [
        f"{stem} {missing} of {len(dataset.scores)} rows"
        for stem, dataset in baseline.datasets.items()
        if (missing := len(dataset.scores.keys() - _scores(run, stem).keys()))
    ]
    if lacking:
        found.append(f"{run.name} lacks rows of the baseline ({_some(lacking)})")
    if found and not allow:
        raise UsageError(
            f"{'; '.join(found)}. Predict what is missing, or gate the rows that both have with --allow_partial."
        )
    yield from (f"{part}; only rows that both have are gated, and failed ones count 0.0." for part in found)


def _mismatches(run: Baseline, baseline: Baseline, limits: Limits, allow: bool) -> Iterator[str]:
    found = list(mismatches(run, baseline))
    if limits.min_speedup is not None:
        found += [f"{part}, for the speed" for part in speed_mismatches(run, baseline)]
    if found and not allow:
        raise UsageError(
            f"{run.name} and {baseline.name} are unlike in more than the method: {_some(found, '; ')}. Predict them "
            f"alike, save a new baseline with --save_baseline, or gate all the same with --allow_unlike."
        )
    yield from (f"unlike: {part}." for part in found)


def _checks(run: Baseline, baseline: Baseline, pairs: list[_Pair], limits: Limits) -> Iterator[Check]:
    yield _mean_check(pairs, limits.max_drop)
    if limits.max_drop_dataset is not None:
        yield from _dataset_checks(pairs, limits.max_drop_dataset)
    if limits.max_kept is not None:
        yield _kept_check(run, limits.max_kept)
    if limits.min_speedup is not None:
        yield _speed_check(run, baseline, limits.min_speedup)


def _mean_check(pairs: list[_Pair], allowed: float) -> Check:
    mine, theirs = (round(sum(pair.scores[at] for pair in pairs) / len(pairs), 2) for at in (0, 1))
    text = _change(f"mean of {len(pairs)} datasets", mine, theirs, allowed) + _noise(pairs)
    drop = round(theirs - mine, 2)
    if drop > allowed:
        worst = sorted((pair for pair in pairs if pair.drop > 0), key=lambda pair: -pair.drop)
        text += f"; most in {', '.join(f'{pair.stem} {pair.drop:.2f}' for pair in worst[:_SHOWN])}"
    return Check(drop <= allowed, text)


def _dataset_checks(pairs: list[_Pair], allowed: float) -> Iterator[Check]:
    fine = [pair for pair in pairs if pair.drop <= allowed]
    yield from (
        Check(False, _change(pair.stem, *pair.scores, allowed)) for pair in pairs if pair.drop > allowed
    )  # fmt: skip
    if fine:
        worst = max(fine, key=lambda pair: pair.drop)
        most = f"down {worst.drop:.2f} at most ({worst.stem})" if worst.drop > 0 else "none is down"
        yield Check(True, f"{len(fine)} of {len(pairs)} datasets: {most}, allowed {_short(allowed)}")


def _kept_check(run: Baseline, allowed: float) -> Check:
    if run.kept is None:
        raise UsageError(
            f"--max_kept {allowed:g} cannot be checked: no row of {run.name} says what was kept, as with the full "
            f"cache. Gate a sparse method, or leave --max_kept out."
        )
    kept = round(run.kept, 4)
    text = f"kept {100 * kept:.2f}%, allowed {_short(100 * allowed)}%"
    return Check(kept <= allowed, text if kept <= allowed else f"{text}: {_short(100 * (kept - allowed))}% too much")


def _speed_check(run: Baseline, baseline: Baseline, asked: float) -> Check:
    for side in (run, baseline):
        if not side.tokens_per_s:
            raise UsageError(
                f"--min_speedup {asked:g} cannot be checked: {side.name} holds no decode speed. Predict it again, or "
                f"leave --min_speedup out."
            )
    mine, theirs = run.tokens_per_s or 0.0, baseline.tokens_per_s or 1.0
    speedup = round(mine / theirs, 2)
    text = f"decode {mine:.1f} tokens/s, baseline {theirs:.1f}: {speedup:.2f} times as fast, asked {_short(asked)}"
    return Check(speedup >= asked, text if speedup >= asked else f"{text}: {_short(asked - speedup)} too little")


def _pair(stem: str, mine: BaselineDataset, theirs: BaselineDataset | None) -> _Pair:
    rows = [row for row in mine.scores if theirs is not None and row in theirs.scores]
    return _Pair(stem, [mine.scores[row] for row in rows], [theirs.scores[row] for row in rows] if theirs else [])


def _scores(side: Baseline, stem: str) -> dict[str, float]:
    return side.datasets[stem].scores if stem in side.datasets else {}


def _change(what: str, mine: float, theirs: float, allowed: float) -> str:
    drop = round(theirs - mine, 2)
    way = f"{'down' if drop > 0 else 'up'} {abs(drop):.2f}" if drop else "no change"
    text = f"{what}: {mine:.2f}, baseline {theirs:.2f}, {way}, allowed {_short(allowed)}"
    return f"{text}: {_short(drop - allowed)} too much" if drop > allowed else text


def _noise(pairs: list[_Pair]) -> str:
    """The 95 % bootstrap interval of the mean's change, which says how much of it may be chance."""
    if any(len(pair.mine) < 2 for pair in pairs):
        return ""
    means = [
        resampled_means(100 * (numpy.array([pair.mine]) - numpy.array([pair.theirs])).T, pair.stem, seed=0)
        for pair in pairs
    ]
    low, high = interval(numpy.mean(means, axis=0))
    return f" (95% interval of the change: {signed(low, 2)} to {signed(high, 2)})"


def _short(value: float) -> str:
    return f"{round(value, 4):g}"


def _some(parts: Sequence[str], between: str = ", ") -> str:
    more = [f"and {len(parts) - _SHOWN} more"] if len(parts) > _SHOWN else []
    return between.join([*parts[:_SHOWN], *more])
