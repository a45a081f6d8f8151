"""Find the prompt tokens of highest score."""

import torch
from torch import Tensor

from sparsecache.kernels._triton import use_kernel
from sparsecache.kernels.pages import select_pages


def highest_positions(scores: Tensor, count: int) -> Tensor:
    """Return the positions of the `count` highest scores, ascending: [G, count] int64. The lower one wins a tie.

    scores: [G, L] in a floating-point dtype; count: 0 to L. On a GPU nothing is sorted.
    """
    length = scores.shape[1]
    if not use_kernel(scores) or not count:
        return scores.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
    # Pages of one token, of one sequence.
    seq_lens, num_excluded = (
        torch.full((1,), number, dtype=torch.int64, device=scores.device) for number in (length, length - count)
    )
    slots = torch.zeros_like(seq_lens)
    return select_pages(scores.float()[None], seq_lens, slots, 1, count, num_excluded=num_excluded).positions[0]
