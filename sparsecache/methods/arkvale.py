"""ArkVale: Efficient Generative LLM Inference with Recallable Key-Value Eviction (NeurIPS'24).

As Quest, with narrower bounds of a page: the middle of its lowest and highest value, less and plus the mean distance
of the page's keys from it, per channel (the paper's "cuboid-mean"). Outliers of a page count for less. The page size
is the authors'.

GQA, and the budget's last page: as in `quest`.

Differences: the paper keeps pages in host memory and recalls those that are selected. Here every token stays on the
device, so what is measured is the selection. The paper selects for layers 2 on, as here by default.
"""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from sparsecache.methods.quest import Quest


@dataclass
class ArkVale(Quest):
    """Selects the pages with the highest bounds from their centre and mean deviation."""

    page: Annotated[int, "tokens in a page, 1 or more"] = 32

    def bounds(self, keys: Tensor, is_held: Tensor) -> tuple[Tensor, Tensor]:
        lowest, highest = super().bounds(keys, is_held)
        centre = (lowest.float() + highest.float()) / 2
        distances = (keys - centre.unsqueeze(-2)).abs().masked_fill(~is_held[..., None], 0)
        mean = distances.sum(-2) / is_held.sum(-1, keepdim=True)
        return centre - mean, centre + mean
