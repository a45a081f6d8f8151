"""Lines as a picture: how long ours, each peer and the limit take, one group of bars for each thing measured."""

from collections.abc import Sequence
from textwrap import shorten

from sparsecache.bench.lines import Line
from sparsecache.longbench.pictures._axes import legend_above
from sparsecache.longbench.pictures._canvas import INK, MUTED, Picture, colours, figure, in_style

_BAR, _NAME, _GAP = 0.13, 0.16, 0.08  # inches


@in_style
def draw(lines: Sequence[Line]) -> Picture:
    """The picture. Raises UsageError, at import, where matplotlib is missing."""
    peers = list(dict.fromkeys(peer for line in lines for peer in line.peers))
    bars = [[*((peer, line.peers.get(peer)) for peer in peers), ("sparsecache", line.seconds)] for line in lines]
    height = _BAR * (len(peers) + 1)
    starts = [_NAME + at * (height + _NAME + _GAP) for at in range(len(lines))]
    end = starts[-1] + height + _GAP
    sheet, axis = figure(end + 0.6 + 0.14 * (len(peers) + 1))
    handles = []
    for number, colour in enumerate(colours(len(peers) + 1)):
        taken = [(start, of_line[number][1]) for start, of_line in zip(starts, bars, strict=True)]
        places = [start + (number + 0.5) * _BAR for start, seconds in taken if seconds is not None]
        times = [1000 * seconds for _, seconds in taken if seconds is not None]
        handles.append(axis.barh(places, times, 0.86 * _BAR, color=colour))
        for place, time in zip(places, times, strict=True):
            axis.text(time, place, f" {time:.3g}", color=MUTED, va="center", fontsize=6)
    for start, line in zip(starts, lines, strict=True):
        name = axis.text(0, start - _NAME / 2, shorten(line.what, 62, placeholder=" .."), va="center")
        name.set_in_layout(False)  # it may be wider than the bars
        if line.limit is not None:
            axis.plot([1000 * line.limit] * 2, [start, start + height], color=INK, linewidth=1.2)
    axis.set_ylim(end, 0)
    axis.set_yticks([])
    axis.set_xlim(0, 1.15 * 1000 * max(seconds or 0 for of_line in bars for _, seconds in of_line))
    axis.set_xlabel("ms (a line: what the machine's limits allow)")
    legend_above(sheet, handles, [*peers, "sparsecache"])
    caption = "Milliseconds of sparsecache and its peers, measured in the same run, on the same prompts."
    return Picture("Speed", caption, sheet)
