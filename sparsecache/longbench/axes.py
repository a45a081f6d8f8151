"""Parts that several pictures share: legends, labels that keep out of each other's way, axes of shares and of scores."""

from collections.abc import Iterable, Sequence
from typing import Any

from sparsecache.longbench.canvas import INK
from sparsecache.longbench.terminal import visible

_LINE = 62  # characters of a legend that fit beside each other in a column
_HANDLE = 6  # the room of a legend's sign, in characters
_PLACES = ((0, 5, "center", "bottom"), (0, -5, "center", "top"), (5, 0, "left", "center"), (-5, 0, "right", "center"))


def short(text: str, most: int = 44) -> str:
    """A name as one line of at most so many characters, its middle left out, never empty."""
    text = visible(text) or "-"
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :]}"


def legend_above(figure: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    """A legend above the data, in as many columns as its names let fit."""
    names = [short(name) for name in names]
    columns = max(1, min(len(names), _LINE // (max(map(len, names)) + _HANDLE)))
    legend = figure.legend(
        handles, [""] * len(names), loc="outside upper left", ncols=columns, columnspacing=1.2, handlelength=2.2
    )
    for label, name in zip(legend.get_texts(), names, strict=True):  # later, since a legend leaves names with _ out
        label.set_text(name)


def score_axis(axis: Any) -> None:
    """A horizontal axis from 0 to 100 with a light grid."""
    axis.set_xlim(0, 100)
    axis.set_xticks(range(0, 101, 20))
    axis.grid(axis="x")


def share_axis(axis: Any, shares: Iterable[float]) -> None:
    """A logarithmic horizontal axis of shares above 0, in percent, a little wider than they are."""
    shares = list(shares)
    low, high = min(shares) / 1.35, min(1.0, max(shares)) * 1.35
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    ticks = [tick for power in range(-6, 1) for step in steps if low <= (tick := step * 10.0**power) <= min(high, 1)]
    axis.set_xticks(ticks, [f"{100 * tick:g}%" for tick in ticks])
    axis.minorticks_off()


def label_points(figure: Any, axis: Any, points: Sequence[tuple[float, float]], labels: Sequence[tuple[int, str]]) -> None:
    """Labels some of the points, by index, where there is room beside them; the others stay without."""
    figure.draw_without_rendering()
    spots = axis.transData.transform(points)
    taken = [(x - 2.5, y - 2.5, x + 2.5, y + 2.5) for x, y in spots]
    frame = axis.get_window_extent()
    for at, text in labels:
        for right, up, across, along in _PLACES:
            label = axis.annotate(
                text, points[at], (right, up), textcoords="offset points", ha=across, va=along, fontsize=6, color=INK
            )
            label.set_in_layout(False)
            box = label.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            others = [spot for number, spot in enumerate(taken) if number != at]
            if inside and not any(_meet(box.extents, other) for other in others):
                taken.append(tuple(box.extents))
                break
            label.remove()


def _meet(one: Sequence[float], two: Sequence[float]) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]
