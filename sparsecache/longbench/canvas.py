"""What pictures are drawn on: one style, colours that everybody can tell apart, files and SVG whose bytes repeat.

The one place that imports matplotlib. Importing it raises UsageError where matplotlib is missing.
"""

import functools
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec
from xml.etree import ElementTree

from sparsecache.errors import UsageError
from sparsecache.longbench.records import write_atomically

try:
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager
except ImportError as error:
    raise UsageError(
        f"Pictures need matplotlib, which cannot be imported ({error}). Install it: python -m pip install 'matplotlib>=3.10'"
    ) from error

COLUMN = 3.3  # inches: the width of a column of a two-column paper
SUFFIXES = (".svg", ".pdf", ".png")

# Pairs of the first seven stay apart under protanopia, deuteranopia and tritanopia, and each from the page (3:1),
# on white and, with the second colour, on the HTML report's dark page.
INK, MUTED, RULE = "#1a1a1a", "#595959", "#d0d0d0"
REFERENCE = "#767676"
SERIES = ("#0077bb", "#d55e00", "#332288", "#aa4499", "#7a1f3d", "#5a3b00")
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    RULE: "--rule",
    REFERENCE: "--reference",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES, 1)},
}
MARKERS = "osD^vP"
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))

_CJK = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei")
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 7,
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
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.major.width": 0.6,
}
_UNDATED = {
    ".svg": dict.fromkeys(("Date", "Creator", "Format", "Type")),
    ".pdf": dict.fromkeys(("CreationDate", "Creator", "Producer")),
    ".png": {"Software": None},
}


@dataclass(frozen=True)
class Picture:
    """A figure, its title, and in words what it shows for whoever cannot see it."""

    title: str
    description: str
    figure: Figure


Arguments = ParamSpec("Arguments")


def drawn(draw: Callable[Arguments, Picture]) -> Callable[Arguments, Picture]:
    """Makes a function draw in the one style, whatever the user's matplotlibrc says."""

    @functools.wraps(draw)
    def styled(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Picture:
        with _style():
            return draw(*args, **kwargs)

    return styled


def save(picture: Picture, path: Path) -> None:
    """Writes a picture, transparent but for PNG, as what its suffix says; the same picture gives the same bytes.

    Raises UsageError for a suffix other than SUFFIXES, or where the file cannot be written.
    """
    write_atomically(path, _bytes(picture, check_suffix(path), svg_text="path"))


def check_suffix(path: Path) -> str:
    """The suffix of a picture's file. Raises UsageError for one that is none of SUFFIXES."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{path} says nothing of its format. Let it end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    return suffix


def inline_svg(picture: Picture, name: str) -> str:
    """A picture as an svg element for an HTML page, text as text, titled and described.

    Colours are the page's variables (VARIABLES), fonts the page's. Ids begin with `name`, which is unique in the page.
    """
    root = ElementTree.fromstring(_bytes(picture, ".svg", svg_text="none"))
    used = set(re.findall(r"#([\w-]+)", " ".join(value for each in root.iter() for value in each.attrib.values())))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = dict(_for_page(element.attrib, name, used))
    for style in root.findall("defs"):
        root.remove(style)  # it would hold for the whole page
    for size in ("width", "height", "version"):
        root.attrib.pop(size)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-text"}
    for at, (tag, ending, text) in enumerate((("title", "title", picture.title), ("desc", "text", picture.description))):
        label = ElementTree.Element(tag, {"id": f"{name}-{ending}"})
        label.text = text
        root.insert(at, label)
    return ElementTree.tostring(root, encoding="unicode")


def _for_page(attributes: dict[str, str], name: str, used: set[str]) -> Iterator[tuple[str, str]]:
    """Attributes as they stand in a page: ids of its own, none that nobody refers to, colours and fonts of the page."""
    for key, value in attributes.items():
        key = key.rpartition("}")[2]
        if key == "id":
            if value in used:
                yield key, f"{name}-{value}"
        elif key == "style":
            value = re.sub(r"font-family:[^;]*;? ?", "", value)
            value = re.sub(r"#[0-9a-f]{6}\b", lambda found: _variable(found[0]), value)
            yield key, value.replace("url(#", f"url(#{name}-")
        elif key == "href":
            yield key, value.replace("#", f"#{name}-")
        else:
            yield key, value.replace("url(#", f"url(#{name}-")


def _variable(colour: str) -> str:
    return f"var({VARIABLES[colour]})" if colour in VARIABLES else colour


def _bytes(picture: Picture, suffix: str, svg_text: str) -> bytes:
    out = io.BytesIO()
    with _style({"svg.fonttype": svg_text, "svg.hashsalt": "sparsecache"}):
        picture.figure.savefig(out, format=suffix[1:], transparent=suffix != ".png", metadata=_UNDATED[suffix])
    return out.getvalue()


@contextmanager
def _style(more: dict[str, Any] | None = None) -> Iterator[None]:
    """The style; Chinese names in a font that has them, if there is one, and boxes without a warning if not."""
    there = {font.name for font in fontManager.ttflist}
    fonts = ["DejaVu Sans", *(font for font in _CJK if font in there)]
    with matplotlib.style.context(["default", {**_STYLE, "font.family": fonts, **(more or {})}]):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            yield
