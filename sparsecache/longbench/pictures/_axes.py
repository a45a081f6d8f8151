"""Parts that several pictures share: legends, names, axes of shares and of scores, intervals."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from sparsecache.errors import UsageError
from sparsecache.longbench.runs import short_names
from sparsecache.longbench.scores import RunScore
from sparsecache.longbench.terminal import visible

MOST_RUNS = 7  # beside each other; more of them are a sweep
_LINE = 62  # characters of a legend that fit beside each other in a column
_HANDLE = 6  # the room of a legend's sign, in characters


def names_of(runs: Sequence[RunScore]) -> list[str]:
    """The runs' names, as short as tells them apart."""
    return [short(name) for name in short_names([run.folder for run in runs])]


def few_names_of(runs: Sequence[RunScore]) -> list[str]:
    """The same where every run has its own colour. Raises UsageError for more than MOST_RUNS."""
    if len(runs) > MOST_RUNS:
        raise UsageError(
            f"{len(runs)} runs do not fit beside each other: {MOST_RUNS} do. Name fewer, or give --kind frontier, "
            f"which draws a sweep."
        )
    return names_of(runs)


def short(text: str, most: int = 44) -> str:
    """A name as one line of at most so many characters, its middle left out, never empty."""
    text = visible(text) or "-"
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :]}"


def legend_above(figure: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    """A legend above the data, in as many columns as its names let fit."""
    columns = max(1, min(len(names), _LINE // (max(map(len, names)) + _HANDLE)))
    legend = figure.legend(
        handles, [""] * len(names), loc="outside upper left", ncols=columns, columnspacing=1.2, handlelength=2.2
    )
    for label, name in zip(legend.get_texts(), names, strict=True):  # later, since a legend leaves names with _ out
        label.set_text(name)


def error_95(score: float, stderr: float | None) -> tuple[float, float]:
    """How far the 95 % interval of a score in percent reaches below and above it; 0 where one row says nothing."""
    error = 1.96 * (stderr or 0.0)
    return min(error, score), min(error, 100 - score)


def name_axis(axis: Any, places: Sequence[float], names: Sequence[str], start: float, end: float) -> None:
    """A vertical axis of names, read downwards from `start` to `end`."""
    axis.set_yticks(places, [short(name, 24) for name in names])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(end, start)


def mean_axis(axis: Any) -> None:
    """A vertical axis of scores that shows those there are and some room, within 0 to 100."""
    low, high = axis.get_ylim()
    room = max(0.15 * (high - low), 5 - (high - low) / 2)
    low, high = max(low - room, -4), min(high + room, 104)
    axis.set_ylim(low, high)
    axis.set_yticks([tick for tick in axis.get_yticks() if max(low, 0) <= tick <= min(high, 100)])
    axis.grid(axis="y")


def share_axis(axis: Any, shares: Iterable[float]) -> None:
    """A logarithmic horizontal axis of shares above 0, in percent: all of them, and at least a decade up to 100 %."""
    shares = list(shares)
    middle = math.sqrt(min(shares) * max(shares))
    reach = max(1.35 * max(shares) / middle, math.sqrt(10))
    low, high = middle / reach, min(middle * reach, 1.35)
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    ticks = [tick for power in range(-9, 1) for step in steps if low <= (tick := step * 10.0**power) <= min(high, 1)]
    axis.set_xticks(ticks, [f"{100 * tick:g}%" for tick in ticks])
    axis.minorticks_off()
