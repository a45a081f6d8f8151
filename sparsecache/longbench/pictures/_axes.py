"""The old name of `plots._axes`."""

from sparsecache.longbench.plots._axes import legend_above as legend_above
