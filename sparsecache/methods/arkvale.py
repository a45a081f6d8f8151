"""ArkVale: Efficient Generative LLM Inference with Recallable Key-Value Eviction (NeurIPS'24).

https://openreview.net/forum?id=4oAt5L4lYe

As Quest, with narrower bounds of a page: the middle of its lowest and highest value, less and plus the mean distance
of the page's keys from it, per channel (the paper's "cuboid-mean"). Outliers of a page count for less. The page size
is the authors'.

GQA, the newest page, and the budget's last page: as in `quest`.

Differences: the paper keeps pages in host memory and recalls those that are selected. Here every token stays on the
device, so what is measured is the selection. The paper selects for layers 2 on, as here by default.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from sparsecache.methods.quest import Quest


@dataclass
class ArkVale(Quest):
    """Selects the pages with the highest bounds from their centre and mean deviation."""

    mean_bounds: ClassVar[bool] = True

    page: Annotated[int, "tokens in a page, 1 to 1024"] = 32
