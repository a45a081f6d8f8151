"""Plots of runs, one module per kind: the module name is the value of `--kind`.

A plot fits one column of a two-column paper. Runs differ in position, marker or dash pattern as well as in color.
Only drawing imports matplotlib; importing this package does not.
"""

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecache.errors import UsageError

if TYPE_CHECKING:
    from sparsecache.longbench.plots._figure import Plot
    from sparsecache.longbench.score_types import RunScore

SUFFIXES = (".svg", ".pdf", ".png")


def plot_kinds() -> list[str]:
    """Return the names of all kinds of plot. Imports none of them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def require_matplotlib() -> None:
    """Raise UsageError if matplotlib is missing."""
    importlib.import_module(f"{__name__}._figure")


def get_plot(kind: str) -> "Callable[[Sequence[RunScore]], Plot]":
    """Return the function that draws a kind of plot. Raises UsageError if matplotlib is missing.

    The function takes one or more runs over the same rows (`paired.common_rows_or_all`). It raises UsageError if the
    runs lack the values that the plot shows.
    """
    draw: Callable[[Sequence[RunScore]], Plot] = importlib.import_module(f"{__name__}.{kind}").draw
    return draw


def draw_all(runs: "Sequence[RunScore]") -> "list[Plot]":
    """Return every plot that these runs, all over the same rows, have the values for.

    Raises UsageError if matplotlib is missing.
    """
    require_matplotlib()
    drawn = []
    for kind in plot_kinds():
        with contextlib.suppress(UsageError):
            drawn.append(get_plot(kind)(runs))
    return drawn


def check_suffix(path: Path) -> str:
    """Return the suffix of a plot's file in lower case.

    Raises UsageError unless it is one of SUFFIXES.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            f"{path} has no suffix of an image format. The suffix sets the format: use {', '.join(SUFFIXES[:-1])} or "
            f"{SUFFIXES[-1]}."
        )
    return suffix
