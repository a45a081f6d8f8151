"""Sorts the runs of a sweep into lines: one per method and group of options, over the option that is swept."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparsecache.longbench.score_types import RunScore

_MISSING = object()


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


def sort_into_lines(runs: Sequence[RunScore]) -> list[LineOf]:
    """Return the line of each run.

    The swept option of a method is `budget` if it differs between the method's runs, else the number that takes most
    values. Runs that differ in another option are on different lines.
    """
    by_method: dict[str, list[int]] = {}
    for at, run in enumerate(runs):
        by_method.setdefault(run.run.identity.method or run.folder.name, []).append(at)
    found: dict[int, LineOf] = {}
    for number, (method, places) in enumerate(by_method.items()):
        options = [runs[at].run.identity.options or {} for at in places]
        for at, (group, point, of_line) in zip(places, _groups(options), strict=True):
            found[at] = LineOf(number, group, " ".join([method, *of_line]), point)
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
