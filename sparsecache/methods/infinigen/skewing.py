"""Skewing matrices: rotations, one per layer and KV head, that gather a query's norm in few channels.

They are made and applied after RoPE, and (q A) (k A)^T = q k^T.
"""

import torch
from torch import Tensor

from sparsecache.cache.base import Shape
from sparsecache.cache.calibration import check_matrices


def skewing_matrix(q: Tensor) -> Tensor:
    """Return the right singular vectors of each KV head's queries, by falling singular value: [G, D, D] float32.

    q: [G, H / G, L, D], rotated queries over a calibration text; the heads of a KV head are stacked.
    """
    stacked = q.double().flatten(1, 2)
    # The eigenvectors of Q^T Q are the right singular vectors of Q; eigenvalues come rising.
    _, vectors = torch.linalg.eigh(stacked.mT @ stacked)
    matrices: Tensor = vectors.flip(-1).float().contiguous()
    return matrices


def skew(x: Tensor, matrices: Tensor) -> Tensor:
    """Return x [..., H, L, D] times its KV head's matrix of [G, D, I], in float32."""
    return x.float() @ matrices.repeat_interleave(x.shape[-3] // len(matrices), 0)


def check_skewing_matrices(matrices: Tensor | None, shape: Shape) -> Tensor:
    """Return skewing matrices [layers, G, D, D] as float32; raise ValueError if they do not fit a model's shape."""
    matrices = check_matrices("skewing_matrix", matrices, shape)
    if not torch.allclose(matrices @ matrices.mT, torch.eye(shape.head_dim).expand_as(matrices), atol=1e-4):
        raise ValueError("its skewing_matrix is not orthogonal.")
    return matrices
