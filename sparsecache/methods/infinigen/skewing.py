"""Skewing matrices: rotations, one per layer and KV head, that gather what queries say in few columns.

They are made and applied after RoPE, and (q A) (k A)^T = q k^T.
"""

import torch
from torch import Tensor


def skewing_matrix(q: Tensor) -> Tensor:
    """The right singular vectors of each KV head's queries, by falling singular value: [G, D, D] float32.

    q: [G, g, L, D], rotated queries over a calibration text; the g heads of a KV head are stacked.
    """
    stacked = q.double().flatten(1, 2)
    # The eigenvectors of Q^T Q are the right singular vectors of Q; eigenvalues come rising.
    _, vectors = torch.linalg.eigh(stacked.mT @ stacked)
    matrices: Tensor = vectors.flip(-1).float().contiguous()
    return matrices


def skew(x: Tensor, matrices: Tensor) -> Tensor:
    """x [.., H, L, D] times its KV head's matrix of [G, D, D], in float32."""
    return x.float() @ matrices.repeat_interleave(x.shape[-3] // len(matrices), 0)
