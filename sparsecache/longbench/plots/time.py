"""Prefill and decode time over all rows, and decode time per token, measured by the engine."""

from collections.abc import Sequence

from sparsecache.errors import UsageError
from sparsecache.longbench.plots._axes import label_y_axis, legend_above, run_labels
from sparsecache.longbench.plots._figure import REFERENCE, SERIES, Plot, new_figure, with_style
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.sessions import clock
from sparsecache.longbench.subjects import subject

_UNITS = ((7200, 3600, "hours"), (300, 60, "minutes"), (0, 1, "seconds"))  # from so many seconds on


@with_style
def draw(runs: Sequence[RunScore]) -> Plot:
    """Return the plot of the runs with recorded times. Raises UsageError if there is none."""
    clocks = {name: found for name, run in zip(run_labels(runs), runs, strict=True) if (found := clock(run.run))}
    if not clocks:
        raise UsageError("No run.json records decode times. Predict again, or use another --kind.")
    prefill, decode = ([found[key] for found in clocks.values()] for key in ("prefill_s", "decode_s"))
    per_token = [1000 * found["decode_s"] / (found["decode_tokens"] or 1) for found in clocks.values()]
    longest = max(map(sum, zip(prefill, decode, strict=True)))
    seconds, unit = next((size, name) for least, size, name in _UNITS if longest >= least)
    figure, (left, right) = new_figure(0.75 + 0.2 * len(clocks), 2, sharey=True)
    positions = range(len(clocks))
    prefill, decode = ([part / seconds for part in parts] for parts in (prefill, decode))
    handles = [
        left.barh(positions, prefill, 0.62, color=REFERENCE),
        left.barh(positions, decode, 0.62, left=prefill, color=SERIES[0]),
    ]
    bars = right.barh(positions, per_token, 0.62, color=SERIES[0])
    right.bar_label(bars, [_three_digits(value) for value in per_token], padding=2)
    right.margins(x=0.25)
    label_y_axis(left, positions, list(clocks), -0.5, len(clocks) - 0.5)
    for axis, label in ((left, unit), (right, "decode, ms/token")):
        axis.set_xlabel(label)
        axis.locator_params(axis="x", nbins=4)
        axis.grid(axis="x")
        axis.tick_params(axis="y", length=0)
    legend_above(figure, handles, ["prefill", "decode"])
    caption = (
        "Time of prefill and decode over all rows per run, and mean decode time per token. The engine measured both."
    )
    return Plot(f"Prefill and decode time: {subject(runs)}", caption, figure)


def _three_digits(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
