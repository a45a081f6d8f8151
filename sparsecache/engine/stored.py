"""A tensor in a file."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of a stored tensor; `read` returns its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
