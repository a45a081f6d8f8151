"""Decides whether a run is as good as a baseline within limits.

Raises UsageError if they are not comparable.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from sparsecache.errors import UsageError
from sparsecache.longbench.baseline import Baseline, BaselineDataset
from sparsecache.longbench.comparability import allowed_differences, mismatches, speed_mismatches
from sparsecache.longbench.gate_checks import Check, Limits, Pair, make_checks
from sparsecache.longbench.identity import method_labels

_MAX_SHOWN = 5


@dataclass(frozen=True)
class Verdict:
    """The checks of a run against a baseline, and warnings about allowed differences."""

    run: Baseline
    baseline: Baseline
    checks: list[Check]
    warnings: list[str]

    @property
    def title(self) -> str:
        """Both runs with their methods."""
        return " against ".join(with_methods([self.run, self.baseline]))

    @property
    def failed_first(self) -> list[Check]:
        """The checks, failed ones first."""
        return sorted(self.checks, key=lambda check: check.passed)

    @property
    def outcome(self) -> str:
        """The result in words."""
        failed = sum(not check.passed for check in self.checks)
        return f"FAILED: {failed} of {len(self.checks)} checks." if failed else "Passed."

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def with_methods(sides: Sequence[Baseline]) -> list[str]:
    """Return the names of runs, each with its method."""
    labels = method_labels([side.method for side in sides])
    return [f"{side.name} ({label})" for side, label in zip(sides, labels, strict=True)]


def gate(
    run: Baseline, baseline: Baseline, limits: Limits, allow_partial: bool = False, allow_unlike: bool = False
) -> Verdict:
    """Check a run against a baseline over their common rows.

    Limits are checked against the rounded (two-decimal) values shown. Raises UsageError if the runs have no common
    rows, if the baseline scores 0 in all of a benchmark's, if rows are missing or failed (unless `allow_partial`), if
    more than the method differs (`comparability`; unless `allow_unlike`), and for a limit on a value that was not
    measured.
    """
    if run.e != baseline.e:
        raise UsageError(f"{baseline.name} is of LongBench{'-E' if baseline.e else ''}, {run.name} is not. {_E_ADVICE}")
    warnings = [*_partial(run, baseline, allow_partial), *_mismatches(run, baseline, limits, allow_unlike)]
    warnings += [f"{part}: the gate includes this difference." for part in allowed_differences(run, baseline)]
    pairs = [_pair(stem, dataset, baseline.datasets.get(stem)) for stem, dataset in run.datasets.items()]
    pairs = [pair for pair in pairs if pair.run]
    if not pairs:
        raise UsageError(f"{run.name} and {baseline.name} have no row in common. Predict the same data with both.")
    strata = [pair for stem in run.datasets for pair in _strata(stem, run, baseline) if pair.run]
    return Verdict(run, baseline, list(make_checks(run, baseline, pairs, strata, limits)), warnings)


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


def format_verdict(verdict: Verdict) -> Iterator[str]:
    """Yield the lines of a verdict, failed checks first."""
    yield verdict.title
    yield from (f"{'passed' if check.passed else 'FAILED'}  {check.text}" for check in verdict.failed_first)
    yield verdict.outcome


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


def _pair(
    stem: str, run: BaselineDataset, baseline: BaselineDataset | None, only: Collection[str] | None = None
) -> Pair:
    known = baseline.scores if baseline else {}
    rows = sorted(row for row in run.scores if row in known and (only is None or row in only))
    return Pair(stem, run.group, [run.scores[row] for row in rows], [known[row] for row in rows])


def _strata(stem: str, run: Baseline, baseline: Baseline) -> Iterator[Pair]:
    """Yield the parts of a dataset of LongBench v2, by the run's own rows."""
    for name, rows in run.datasets[stem].strata.items():
        yield _pair(f"{stem} {name}", run.datasets[stem], baseline.datasets.get(stem), set(rows))


def _scores(side: Baseline, stem: str) -> dict[str, float]:
    return side.datasets[stem].scores if stem in side.datasets else {}


def _listed(parts: Sequence[str], separator: str = ", ") -> str:
    more = [f"and {len(parts) - _MAX_SHOWN} more"] if len(parts) > _MAX_SHOWN else []
    return separator.join([*parts[:_MAX_SHOWN], *more])
