"""What pictures are drawn on: one style, colours that everybody can tell apart, files whose bytes repeat.

The one place that imports matplotlib. Importing it raises UsageError where matplotlib is missing.
"""

import functools
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

from sparsecache.errors import UsageError
from sparsecache.files import write_atomically
from sparsecache.longbench.pictures import check_suffix

try:
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager
except ImportError as error:
    raise UsageError(
        f"Pictures, and so reports with pictures, need matplotlib, which cannot be imported ({error}). Install it: "
        f"python -m pip install 'matplotlib>=3.10'"
    ) from error

COLUMN = 3.3  # inches: the width of a column of a two-column paper

# Any two of the series and the reference stay apart under protanopia, deuteranopia and tritanopia, and stand out from
# white (3:1). report.css has other colours in their place for its dark page.
INK, MUTED, RULE = "#1a1a1a", "#595959", "#d0d0d0"
REFERENCE = "#767676"
SERIES = ("#0077bb", "#d55e00", "#aa4499", "#332288", "#7a1f3d", "#5a3b00")
_MARKERS = "osD^vP"
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))

_CJK = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei")
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 72,
    "font.size": 7,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
    "svg.hashsalt": "sparsecache",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.major.width": 0.6,
}
_UNDATED: dict[str, dict[str, None]] = {
    ".svg": dict.fromkeys(("Date", "Creator", "Format", "Type")),
    ".pdf": dict.fromkeys(("CreationDate", "Creator", "Producer")),
    ".png": {"Software": None},
}


@dataclass(frozen=True)
class Picture:
    """A figure, its title, and in words what it shows: a caption, and the text for whoever cannot see it."""

    title: str
    caption: str
    figure: Figure

    def save(self, path: Path) -> None:
        """Writes a file of the format that its suffix names, transparent but for PNG; the same bytes every time.

        Raises UsageError for a suffix that is none of SUFFIXES, or where the file cannot be written.
        """
        write_atomically(path, self._bytes(check_suffix(path)))

    def svg(self) -> bytes:
        """The picture as SVG whose text is text, to be set in the reader's fonts."""
        return self._bytes(".svg", {"svg.fonttype": "none"})

    def _bytes(self, suffix: str, style: dict[str, Any] | None = None) -> bytes:
        out = io.BytesIO()
        with _style(style):
            self.figure.savefig(out, format=suffix[1:], transparent=suffix != ".png", metadata=_UNDATED[suffix])
        return out.getvalue()


def figure(height: float, columns: int = 1, **layout: Any) -> tuple[Figure, Any]:
    """An empty figure as wide as a column, `height` inches high, and its axes: one, or several beside each other."""
    sheet = Figure(figsize=(COLUMN, height))
    return sheet, sheet.subplots(1, columns, **layout)


def colours(runs: int) -> list[str]:
    """A colour for each of so many runs: the first of several in the reference's, one alone in a series'."""
    return [SERIES[0]] if runs == 1 else [REFERENCE, *SERIES][:runs]


def pen(number: int) -> dict[str, Any]:
    """How the line of a series is drawn, from 0 on: no two of the first twelve look alike, in grey neither."""
    return {
        "color": SERIES[number % len(SERIES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[(number + number // len(SERIES)) % len(_DASHES)],
    }


Arguments = ParamSpec("Arguments")


def in_style(draw: Callable[Arguments, Picture]) -> Callable[Arguments, Picture]:
    """Makes a function draw in the one style, whatever the user's matplotlibrc says."""

    @functools.wraps(draw)
    def styled(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Picture:
        with _style():
            return draw(*args, **kwargs)

    return styled


@contextmanager
def _style(more: dict[str, Any] | None = None) -> Iterator[None]:
    """The style; Chinese names in a font that has them, if there is one, and boxes without a warning if not."""
    there = {font.name for font in fontManager.ttflist}
    fonts = ["DejaVu Sans", *(font for font in _CJK if font in there)]
    style = matplotlib.style.context(["default", {**_STYLE, "font.family": fonts, **(more or {})}])
    with style, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
