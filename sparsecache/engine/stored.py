"""A tensor, or a matrix in fp8, in a file that is read on demand."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsecache.kernels.fp8 import Matrix


@dataclass(frozen=True)
class StoredTensor:
    """The shape and dtype of a stored tensor. read: returns its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Matrix]
