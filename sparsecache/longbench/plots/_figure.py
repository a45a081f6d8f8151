"""Figures in one style, with color-blind safe colors and reproducible files.

The only module that imports matplotlib. Importing it raises UsageError if matplotlib is missing.
"""

import functools
import io
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

from sparsecache.errors import UsageError
from sparsecache.files import write_atomically
from sparsecache.longbench.plots import check_suffix

try:
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties, fontManager
except ImportError as error:
    raise UsageError(
        f"Plots, and reports with plots, need matplotlib, which cannot be imported ({error}). Install it: "
        f"python -m pip install 'matplotlib>=3.10'"
    ) from error

ABOVE = "above"  # label of a legend above the axes
COLUMN = 3.3  # inches: column width of a two-column paper
PAGE = 7.0  # inches: width of both columns
_TITLE_CHARS, _TITLE_HEIGHT = 17, 0.16  # title: characters that fit into an inch, inches per line

# Any two of SERIES and REFERENCE are distinct under protanopia, deuteranopia and tritanopia, and have a contrast of
# 3:1 with white. report.css replaces them on its dark page.
INK, MUTED, RULE = "#1a1a1a", "#595959", "#d0d0d0"
REFERENCE = "#767676"
SERIES = ("#0077bb", "#d55e00", "#aa4499", "#332288", "#7a1f3d", "#5a3b00")
_MARKERS = "osD^vPX<>ph"  # eleven, so that 66 methods differ in color or marker
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))

_CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Microsoft YaHei",
)
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
_METADATA: dict[str, dict[str, None]] = {
    ".svg": dict.fromkeys(("Date", "Creator", "Format", "Type")),
    ".pdf": dict.fromkeys(("CreationDate", "Creator", "Producer")),
    ".png": {"Software": None},
}


@dataclass(frozen=True)
class Plot:
    """A figure with its title, and a caption that also serves as its alternative text."""

    title: str
    caption: str
    figure: Figure

    @property
    def is_wide(self) -> bool:
        """Whether the plot is wider than a column of a paper."""
        return bool(self.figure.get_figwidth() > COLUMN)

    def save(self, path: Path) -> None:
        """Write a file in the format of its suffix, with the title above the plot.

        Only PNG has a background; the bytes are reproducible.

        Raises UsageError for a suffix that is not in SUFFIXES, and if the file cannot be written.
        """
        suffix = check_suffix(path)
        with self._title_above():
            write_atomically(path, self._bytes(suffix))

    @contextmanager
    def _title_above(self) -> Iterator[None]:
        """Add the title, and room for it, while the block runs. A legend above takes it as its own title."""
        width, height = self.figure.get_size_inches()
        lines = textwrap.wrap(self.title, int(width * _TITLE_CHARS))
        text, above = "\n".join(lines), [each for each in self.figure.legends if each.get_label() == ABOVE]
        with _style():
            self.figure.set_size_inches(width, height + _TITLE_HEIGHT * len(lines))
            if above:
                above[0].set_title(text, FontProperties(size=8))
                above[0].set_alignment("left")
            else:
                self.figure.suptitle(text, x=0.01, ha="left", fontsize=8)
        yield
        for legend in above:
            legend.set_title("")
        self.figure.suptitle("")
        self.figure.set_size_inches(width, height)

    def svg(self) -> bytes:
        """Return the plot as SVG, with text as text elements instead of outlines."""
        return self._bytes(".svg", {"svg.fonttype": "none"})

    def _bytes(self, suffix: str, style: dict[str, Any] | None = None) -> bytes:
        out = io.BytesIO()
        with _style(style):
            self.figure.savefig(out, format=suffix[1:], transparent=suffix != ".png", metadata=_METADATA[suffix])
        return out.getvalue()


def new_figure(
    height: float, columns: int = 1, width: float = COLUMN, rows: int = 1, **layout: Any
) -> tuple[Figure, Any]:
    """Return a figure of this size in inches, and its axes."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, **layout)


def run_colors(runs: int) -> list[str]:
    """Return a color per run: REFERENCE for the first of several, else colors of SERIES."""
    return [SERIES[0]] if runs == 1 else [REFERENCE, *SERIES][:runs]


def line_style(number: int, group: int = 0) -> dict[str, Any]:
    """Return the color, marker and dashes of series `number`.

    Where colors repeat, and for another `group` of the series, dashes differ. The first twelve series differ also in
    grayscale.
    """
    return {
        "color": SERIES[number % len(SERIES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[(number // len(SERIES) + group) % len(_DASHES)],
        "markerfacecolor": "white" if group % 2 else SERIES[number % len(SERIES)],
    }


Arguments = ParamSpec("Arguments")


def with_style(draw: Callable[Arguments, Plot]) -> Callable[Arguments, Plot]:
    """Decorate a drawing function to use the common style instead of the user's matplotlibrc."""

    @functools.wraps(draw)
    def styled(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Plot:
        with _style():
            return draw(*args, **kwargs)

    return styled


@contextmanager
def _style(more: dict[str, Any] | None = None) -> Iterator[None]:
    """Apply the style, with an installed CJK font for Chinese names.

    Without one, suppress the warning.
    """
    installed = {font.name for font in fontManager.ttflist}
    fonts = ["DejaVu Sans", *(font for font in _CJK_FONTS if font in installed)]
    style = matplotlib.style.context(["default", {**_STYLE, "font.family": fonts, **(more or {})}])
    with style, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
