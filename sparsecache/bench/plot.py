"""A plot of results: bars of the engine's and each baseline's milliseconds, one group per result."""

from collections.abc import Sequence
from textwrap import shorten

from sparsecache.bench.results import Result
from sparsecache.longbench.plots._axes import legend_above
from sparsecache.longbench.plots._figure import INK, MUTED, Plot, new_figure, run_colors, with_style

_BAR, _NAME, _GAP = 0.13, 0.16, 0.08  # inches


@with_style
def draw(results: Sequence[Result]) -> Plot:
    """Return the plot. The import raises UsageError if matplotlib is missing."""
    baselines = list(dict.fromkeys(name for result in results for name in result.baselines))
    bars = [[*(result.baselines.get(name) for name in baselines), result.seconds] for result in results]
    height = _BAR * (len(baselines) + 1)
    starts = [_NAME + at * (height + _NAME + _GAP) for at in range(len(results))]
    end = starts[-1] + height + _GAP
    sheet, axis = new_figure(end + 0.6 + 0.14 * (len(baselines) + 1))
    handles = []
    for number, color in enumerate(run_colors(len(baselines) + 1)):
        group = [(start, seconds[number]) for start, seconds in zip(starts, bars, strict=True)]
        places = [start + (number + 0.5) * _BAR for start, seconds in group if seconds is not None]
        times = [1000 * seconds for _, seconds in group if seconds is not None]
        handles.append(axis.barh(places, times, 0.86 * _BAR, color=color))
        for place, time in zip(places, times, strict=True):
            axis.text(time, place, f" {time:.3g}", color=MUTED, va="center", fontsize=6)
    for start, result in zip(starts, results, strict=True):
        name = axis.text(0, start - _NAME / 2, shorten(result.name, 62, placeholder=" .."), va="center")
        name.set_in_layout(False)  # it may be wider than the bars
        if result.roofline_s is not None:
            axis.plot([1000 * result.roofline_s] * 2, [start, start + height], color=INK, linewidth=1.2)
    axis.set_ylim(end, 0)
    axis.set_yticks([])
    axis.set_xlim(0, 1.15 * 1000 * max(seconds or 0 for group in bars for seconds in group))
    axis.set_xlabel("ms (vertical line: roofline)")
    legend_above(sheet, handles, [*baselines, "sparsecache"])
    return Plot("Speed", "Milliseconds of sparsecache and the baselines, in one run over the same prompts.", sheet)
