"""Where the time goes: prefill and decode over all rows of a run, and decode time per token, by the engine's clock."""

from collections.abc import Sequence

from sparsecache.errors import UsageError
from sparsecache.longbench.pictures._axes import legend_above, name_axis, names_of
from sparsecache.longbench.pictures._canvas import REFERENCE, SERIES, Picture, figure, in_style
from sparsecache.longbench.scores import RunScore
from sparsecache.longbench.sessions import clock

_UNITS = ((7200, 3600, "hours"), (300, 60, "minutes"), (0, 1, "seconds"))  # from so many seconds on


@in_style
def draw(runs: Sequence[RunScore]) -> Picture:
    """The picture, of the runs that have a clock. Raises UsageError where none has."""
    clocks = {name: found for name, run in zip(names_of(runs), runs, strict=True) if (found := clock(run.run))}
    if not clocks:
        raise UsageError("No run.json says how long decoding took. Predict again, or give another --kind.")
    prefill, decode = ([found[key] for found in clocks.values()] for key in ("prefill_s", "decode_s"))
    per_token = [1000 * found["decode_s"] / (found["decode_tokens"] or 1) for found in clocks.values()]
    most = max(map(sum, zip(prefill, decode, strict=True)))
    seconds, unit = next((size, name) for least, size, name in _UNITS if most >= least)
    sheet, (left, right) = figure(0.75 + 0.2 * len(clocks), 2, sharey=True)
    places = range(len(clocks))
    before, after = ([part / seconds for part in parts] for parts in (prefill, decode))
    handles = [
        left.barh(places, before, 0.62, color=REFERENCE),
        left.barh(places, after, 0.62, left=before, color=SERIES[0]),
    ]
    bars = right.barh(places, per_token, 0.62, color=SERIES[0])
    right.bar_label(bars, [_three_digits(value) for value in per_token], padding=2)
    right.margins(x=0.25)
    name_axis(left, places, list(clocks), -0.5, len(clocks) - 0.5)
    for axis, label in ((left, f"{unit}, all rows"), (right, "decode, ms per token")):
        axis.set_xlabel(label)
        axis.locator_params(axis="x", nbins=4)
        axis.grid(axis="x")
        axis.tick_params(axis="y", length=0)
    legend_above(sheet, handles, ["prefill", "decode"])
    caption = "Time of prefill and decode over all rows of each run, and mean time per decoded token (engine's clock)."
    return Picture("Where the time goes", caption, sheet)


def _three_digits(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
