"""A tensor in a file that is read on demand."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StoredTensor:
    """The shape and dtype of a stored tensor. read: returns its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
