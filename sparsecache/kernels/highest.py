"""Find the prompt tokens of highest score."""

from torch import Tensor

from sparsecache.kernels._triton import use_kernel
from sparsecache.kernels.page_selection import highest_of_prompt


def highest_positions(scores: Tensor, count: int) -> Tensor:
    """Return the positions of the `count` highest scores, ascending: [G, count] int64. The lower one wins a tie.

    scores: [G, L] in a floating-point dtype; count: 0 to L. On a GPU nothing is sorted.
    """
    if use_kernel(scores) and count:
        return highest_of_prompt(scores.float(), count)
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
