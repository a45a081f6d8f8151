"""The old names of `plots._figure`."""

from sparsecache.longbench.plots._figure import INK as INK
from sparsecache.longbench.plots._figure import MUTED as MUTED
from sparsecache.longbench.plots._figure import Plot as Picture
from sparsecache.longbench.plots._figure import new_figure as figure
from sparsecache.longbench.plots._figure import run_colors as colours
from sparsecache.longbench.plots._figure import with_style as in_style

__all__ = ["INK", "MUTED", "Picture", "colours", "figure", "in_style"]
