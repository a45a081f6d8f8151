"""Pictures of runs, one module each: the file name is the picture's kind. Drawn for a column of a two-column paper.

Runs are told apart by place, marker or dashes too, never by colour alone. Drawing needs matplotlib, importing this
module does not.
"""

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecache.errors import UsageError

if TYPE_CHECKING:
    from sparsecache.longbench.pictures._canvas import Picture
    from sparsecache.longbench.scores import RunScore

SUFFIXES = (".svg", ".pdf", ".png")


def kinds() -> list[str]:
    """Every kind of picture, without importing any (nor matplotlib)."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def require_matplotlib() -> None:
    """Raises UsageError where matplotlib is missing."""
    importlib.import_module(f"{__name__}._canvas")


def painter(kind: str) -> "Callable[[Sequence[RunScore]], Picture]":
    """What draws a kind of picture: a function of one or more runs, all of the same rows (see paired.same_rows).

    It raises UsageError where these runs lack what it takes; so does this one where matplotlib is missing.
    """
    draw: Callable[[Sequence[RunScore]], Picture] = importlib.import_module(f"{__name__}.{kind}").draw
    return draw


def pictures(runs: "Sequence[RunScore]") -> "list[Picture]":
    """Every picture that these runs, all of the same rows, have what it takes for.

    Raises UsageError where matplotlib is missing.
    """
    require_matplotlib()
    drawn = []
    for kind in kinds():
        with contextlib.suppress(UsageError):
            drawn.append(painter(kind)(runs))
    return drawn


def check_suffix(path: Path) -> str:
    """The suffix of a picture's file. Raises UsageError for one that is none of SUFFIXES."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            f"{path} is no file name for a picture, since its end says the format. Let it end in "
            f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}."
        )
    return suffix
