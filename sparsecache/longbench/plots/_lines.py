"""The lines of a sweep's plots: one per method and group of options, over the option that is swept."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sparsecache.errors import UsageError
from sparsecache.longbench.compare import compare
from sparsecache.longbench.identity import method_labels
from sparsecache.longbench.paired import MIN_ROWS
from sparsecache.longbench.plots._axes import run_labels, shorten
from sparsecache.longbench.score_types import GROUP_NAMES, MEANS, Average, RunScore

MEAN_NAMES = {mean: GROUP_NAMES[group] for group, mean in MEANS.items()}
_MISSING = object()
_MOST_LABELED = 16  # points


class Point(NamedTuple):
    """A run: kept share, score, reach of its interval below and above, and its label."""

    share: float
    score: float
    below: float
    above: float
    text: str


@dataclass(frozen=True)
class LineOf:
    """The line that a run is on.

    method: its number, and its name with the options that tell its lines apart. group: the number of the line among
    those of the method. point: the value of the swept option; empty if nothing is swept.
    """

    method: int
    group: int
    name: str
    point: str


@dataclass(frozen=True)
class Sweep:
    """The lines of runs, each with its points per mean.

    means: those of MEANS that have points. full: the run of the full cache, if there is one, and full_name: its name in
    legends. caption: what is shown.
    """

    means: list[str]
    full: RunScore | None
    full_name: str
    lines: dict[LineOf, dict[str, list[Point]]]
    caption: str

    def shares(self, mean: str) -> Iterable[float]:
        """Return the kept shares of all points."""
        return [point.share for points in self.lines.values() for point in points.get(mean, ())]

    def scores(self, mean: str) -> Iterable[float]:
        """Return the scores at the ends of all error bars, and of the full cache."""
        points = [point for points in self.lines.values() for point in points.get(mean, ())]
        full = [self.full.averages[mean].score or 0.0] if self.full else []
        return [*full, *(end for point in points for end in (point.score - point.below, point.score + point.above))]

    def texts(self, mean: str, method: int | None = None) -> list[tuple[float, float, str]]:
        """Return share, score and text of the points of all methods or one, line by line."""
        lines = [points.get(mean, ()) for line, points in self.lines.items() if method in (None, line.method)]
        return [(point.share, point.score, point.text) for points in lines for point in sorted(points)]


def make_sweep(runs: Sequence[RunScore]) -> Sweep:
    """Return the lines of runs over the same rows. Raises UsageError for a single run, and without a kept share."""
    if len(runs) < 2:
        raise UsageError("This plot needs two runs or more. Name several, with the full cache, or use another --kind.")
    means = [mean for mean in MEANS.values() if any(_kept(run, mean) for run in runs)]
    if not means:
        raise UsageError(
            "No run reports a kept share for its datasets. Name runs of sparse methods, or use another --kind."
        )
    full = [run for run in runs if all(_kept(run, mean) is None for mean in means)]
    full.sort(key=lambda run: run.run.identity.method != "vanilla")
    sparse = [run for run in runs if any(_kept(run, mean) is not None for mean in means)]
    places = sort_into_lines(sparse)
    intervals = _intervals(full[0], sparse) if full else [dict[str, tuple[float, float]]() for _ in sparse]
    names = dict(zip(map(id, runs), run_labels(runs), strict=True))
    extents = [(MEAN_NAMES[mean] if len(means) > 1 else "", runs[0].averages[mean]) for mean in means]
    caption = " ".join(_caption(extents, [names[id(run)] for run in full]))
    full_name = f"{shorten(names[id(full[0])], 24)} (full cache)" if full else ""
    lines: dict[LineOf, dict[str, list[Point]]] = {}
    for run, place, around in zip(sparse, places, intervals, strict=True):
        for mean in (mean for mean in means if _kept(run, mean)):
            text = run.label or (place.point if _is_labeled(place, len(sparse)) else "")
            point = _make_point(run.averages[mean], around.get(mean, (0.0, 0.0)), text)
            lines.setdefault(replace(place, point=""), {}).setdefault(mean, []).append(point)
    return Sweep(means, full[0] if full else None, full_name, lines, caption)


def sort_into_lines(runs: Sequence[RunScore]) -> list[LineOf]:
    """Return the line of each run.

    The swept option of a method is `budget` if it differs between the method's runs, else the number that takes most
    values. Runs that differ in another option are on different lines.
    """
    by_method: dict[str, list[int]] = {}
    for at, run in enumerate(runs):
        by_method.setdefault(run.run.identity.method or run.folder.name, []).append(at)
    found: dict[int, LineOf] = {}
    labels = method_labels(list(by_method))
    for number, (label, places) in enumerate(zip(labels, by_method.values(), strict=True)):
        options = [runs[at].run.identity.options or {} for at in places]
        for at, (group, point, of_line) in zip(places, _groups(options), strict=True):
            found[at] = LineOf(number, group, " ".join([label, *of_line]), point)
    return [found[at] for at in range(len(runs))]


def _groups(options: Sequence[dict[str, Any]]) -> Iterator[tuple[int, str, list[str]]]:
    """Yield per run of one method: number of its line, value of the swept option, options of its line."""
    keys = dict.fromkeys(key for each in options for key in each)
    values = {key: {repr(each.get(key, _MISSING)) for each in options} for key in keys}
    varying = [key for key in keys if len(values[key]) > 1]
    numbers = [key for key in varying if all(_is_number(each.get(key)) for each in options)]
    swept = "budget" if "budget" in varying else max(numbers, key=lambda key: len(values[key]), default=None)
    numbered: dict[tuple[str, ...], int] = {}
    for each in options:
        of_line = tuple(f"{key}={_shown(each[key])}" for key in varying if key != swept and key in each)
        point = "" if swept is None or swept not in each else _point(swept, each[swept])
        yield numbered.setdefault(of_line, len(numbered)), point, list(of_line)


def _point(key: str, value: Any) -> str:
    if key == "budget" and _is_number(value):
        return f"{100 * value:g}%" if value <= 1 else f"{value:g}"
    return f"{key}={_shown(value)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return f"{value:g}" if _is_number(value) else str(value).lower() if isinstance(value, bool | None) else str(value)


def _make_point(mean: Average, around: tuple[float, float], text: str) -> Point:
    return Point(mean.kept or 0.0, mean.score or 0.0, *around, text)


def _is_labeled(place: LineOf, points: int) -> bool:
    return points <= _MOST_LABELED or "=" in place.point


def _intervals(full: RunScore, sparse: Sequence[RunScore]) -> list[dict[str, tuple[float, float]]]:
    """Return per run and mean how far the 95 % interval of its difference to the full cache reaches below and above."""
    groups = [group for group in compare([full, *sparse]).groups if group.kind == "average"]
    return [
        {
            group.name: (difference.mean - difference.interval[0], difference.interval[1] - difference.mean)
            for group in groups
            if (difference := group.entries[at].difference) and difference.interval
        }
        for at in range(1, len(sparse) + 1)
    ]


def _kept(run: RunScore, mean: str) -> float | None:
    return run.averages[mean].kept if mean in run.averages else None


def _caption(means: Sequence[tuple[str, Average]], full: Sequence[str]) -> Iterator[str]:
    parts = [f"{name + ': ' if name else ''}{mean.datasets} datasets ({mean.n} rows)" for name, mean in means]
    yield f"Mean score of {'; '.join(parts)} against the share of past tokens attended to."
    if full and any(mean.n >= MIN_ROWS for _, mean in means):
        yield f"Error bars are 95% intervals of the paired difference to {full[0]}."
    if full[1:]:
        yield f"Not shown, because they report no kept share: {', '.join(full[1:])}."
