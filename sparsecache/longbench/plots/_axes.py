"""Parts that several plots share: run labels, legends, axes and error bars."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from sparsecache.errors import UsageError
from sparsecache.longbench.paired import MIN_ROWS
from sparsecache.longbench.plots._figure import ABOVE
from sparsecache.longbench.runs import run_names
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.terminal import escape_control_chars

KEPT_LABEL = "kept share of past tokens in sparse layers"
MAX_RUNS = 7  # side by side
_LEGEND_CHARS = 19  # characters that fit into an inch of a legend
_HANDLE_CHARS = 6  # width of a legend handle, in characters
_CORNERS = ((3, 3), (3, -3), (-3, 3), (-3, -3))  # offsets of a label from its point, in points of a figure


def run_labels(runs: Sequence[RunScore], max_runs: int | None = None) -> list[str]:
    """Return a short, distinct label per run. Raises UsageError for more than `max_runs` runs."""
    if max_runs is not None and len(runs) > max_runs:
        raise UsageError(
            f"{len(runs)} runs are too many for this plot; it shows at most {max_runs}. Name fewer runs, or use "
            f"--kind frontier, which shows any number."
        )
    return [shorten(name) for name in run_names(runs)]


def shorten(text: str, max_chars: int = 44) -> str:
    """Return a name as one line of at most `max_chars` characters; longer ones lose their middle."""
    text = escape_control_chars(text) or "-"
    if len(text) <= max_chars:
        return text
    return f"{text[: max_chars // 2]}…{text[len(text) - (max_chars - 1) // 2 :]}"


def legend_above(figure: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Add a legend above the axes, in as many columns as fit."""
    chars = int(figure.get_size_inches()[0] * _LEGEND_CHARS)
    columns = max(1, min(len(names), chars // (max(map(len, names)) + _HANDLE_CHARS)))
    _legend(figure, handles, names, "outside upper left", columns).set_label(ABOVE)


def legend_beside(figure: Any, handles: Sequence[Any], names: Sequence[str], rows: int) -> None:
    """Add a legend to the right of the axes, with `rows` names per column."""
    _legend(figure, handles, names, "outside right upper", math.ceil(len(names) / rows))


def _legend(figure: Any, handles: Sequence[Any], names: Sequence[str], place: str, columns: int) -> Any:
    legend = figure.legend(
        handles, [""] * len(names), loc=place, ncols=columns, columnspacing=1.2, handlelength=2.2
    )  # fmt: skip
    # Set afterwards: legend() leaves out labels that begin with an underscore.
    for label, name in zip(legend.get_texts(), names, strict=True):
        label.set_text(name)
    return legend


def error_bar(score: float, stderr: float | None, rows: int) -> tuple[float, float]:
    """Return the lengths of the 95 % interval below and above a score, clipped to 0 and 100 %.

    Both are 0 if the standard error is unknown, and for fewer than MIN_ROWS rows.
    """
    error = 1.96 * (stderr or 0.0) if rows >= MIN_ROWS else 0.0
    return min(error, score), min(error, 100 - score)


def label_points(axis: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write the text of each (x, y, text) beside its point, where it covers no point, no other text and no title.

    A text without such a place is above its point at the right. The figure must have its final layout.
    """
    drawn = axis.transData.transform([point[:2] for point in points])
    boxes: list[Any] = []
    for x, y, text in points:
        for at, (dx, dy) in enumerate((*_CORNERS, _CORNERS[0]) if text else ()):
            side = {"ha": "left" if dx > 0 else "right", "va": "bottom" if dy > 0 else "top"}
            label = axis.annotate(shorten(text), (x, y), (dx, dy), textcoords="offset points", fontsize=6, **side)
            box = label.get_window_extent().padded(0.5)
            covers = box.count_overlaps(boxes) or any(box.contains(*point) for point in drawn)
            if at == len(_CORNERS) or not (covers or box.y1 > axis.bbox.y1):
                boxes.append(box)
                break
            label.remove()


def label_y_axis(axis: Any, positions: Sequence[float], names: Sequence[str], start: float, end: float) -> None:
    """Label a vertical axis with names. It runs downwards from `start` to `end`."""
    axis.set_yticks(positions, [shorten(name, 24) for name in names])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(end, start)


def set_score_axis(axis: Any, scores: Iterable[float]) -> None:
    """Limit a vertical axis to these scores plus a small margin. It spans at least two points."""
    scores = list(scores)
    low, high = min(scores), max(scores)
    margin = max(0.05 * (high - low), 1 - (high - low) / 2)
    low, high = low - margin, high + margin
    if low < 0 or high > 100:  # nothing is there: leave room for the markers alone
        low, high = max(low, -0.02 * (high - low)), min(high, 100 + 0.02 * (high - low))
    axis.set_ylim(low, high)
    axis.set_yticks([tick for tick in axis.get_yticks() if max(low, 0) <= tick <= min(high, 100)])
    axis.grid(axis="y")


def set_share_axis(axis: Any, shares: Iterable[float], narrow: bool = False) -> None:
    """Make a horizontal axis logarithmic, in percent, for shares above 0. A narrow one has few ticks.

    It spans at least a factor of ten.
    """
    shares = list(shares)
    middle = math.sqrt(min(shares) * max(shares))
    factor = max(1.35 * max(shares) / middle, math.sqrt(10))
    low, high = middle / factor, min(middle * factor, 1.35)
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    choices = [(1,), (2,), (5,)] if narrow or high / low >= 300 else []
    ticks: list[float] = []
    for steps in (*choices, (1, 2, 5)):
        if len(ticks) < 2:
            found = (step * 10.0**power for power in range(-9, 1) for step in steps)
            ticks = [tick for tick in found if low <= tick <= min(high, 1)]
    axis.set_xticks(ticks, [f"{100 * tick:g}%" for tick in ticks])
    axis.minorticks_off()
