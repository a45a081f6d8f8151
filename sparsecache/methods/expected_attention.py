"""Expected Attention: KV Cache Compression by Estimating Attention from Future Queries (2025, arXiv 2510.00636).

Queries before RoPE are modelled as normally distributed, with the mean and the covariance of the prompt's queries. Both
are rotated by the average rotation of the next `future` positions, which gives the mean m and the covariance C. A key's
expected attention is the softmax over the prompt of m . k / sqrt(D) + k^T C k / 2D. The tokens with the highest
(expected attention + `epsilon`) * |v| stay. The first `sinks` tokens always stay, and do not count in the statistics.
Defaults are those of the authors' benchmark; the budget is this project's.

GQA: as in the paper, a KV head takes the mean expected attention of its query heads.

Differences: queries are rotated back, since a cache receives rotated queries; on a GPU they are then rounded to the
model's dtype. KV heads keep equally many tokens; the authors' benchmark gives them different counts, as `adakv` does.
The authors' benchmark evicts before the question comes. Here the question is part of the prompt, and `recent` keeps it.
"""

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from sparsecache.cache.checks import check_token_counts
from sparsecache.cache.eviction import EvictionMethod, pin_last
from sparsecache.kernels.moments import expected_logits, token_moments
from sparsecache.kernels.rotation import Rotation, RotationOf, rotate_rows

_MAX_FUTURE = 65536


class _Rotations(NamedTuple):
    """What all layers share for prompts of one length.

    of_tokens: of the N tokens after the sinks, [N, R]. mean: [D, D] float32; x @ mean rotates x [.., D] by the mean
    rotation of the future positions. mean_of_sum: [D, D], mean / N. pinned: [G, sinks] float32, the sinks' scores.
    """

    of_tokens: Rotation
    mean: Tensor
    mean_of_sum: Tensor
    pinned: Tensor


@dataclass
class ExpectedAttention(EvictionMethod):
    """Keeps the prompt tokens that future queries are expected to attend to, and every generated token."""

    uses_rope = True

    future: Annotated[int, "future positions whose rotations are averaged, 1 to 65536"] = 512
    sinks: Annotated[int, "first tokens that always stay, 0 or more"] = 4
    epsilon: Annotated[float, "added to the expected attention before it is multiplied by the norm of the value"] = 0.01
    recent: Annotated[int, "last prompt tokens that always stay, 0 or more"] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.future <= _MAX_FUTURE:
            raise ValueError(f"future={self.future} must be 1 to {_MAX_FUTURE} positions.")
        check_token_counts(sinks=self.sinks, recent=self.recent)
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon={self.epsilon} must be 0 or more.")
        self._latest: tuple[tuple[RotationOf, torch.Size, torch.device], _Rotations] | None = None

    def score(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv_heads, length = k.shape[:2]
        sinks = min(self.sinks, length)
        if sinks == length:
            return torch.full((kv_heads, length), torch.inf, device=k.device)
        q, k, v = q[:, sinks:], k[:, sinks:], v[:, sinks:]
        rotations = self._rotations_for(k)
        sums, products = token_moments(q, rotations.of_tokens)
        mean = sums @ rotations.mean_of_sum
        products = (products @ rotations.mean_of_sum).mT  # rotated on one side
        rotation = rotations.mean.expand_as(products)
        covariance = torch.baddbmm(mean[:, :, None] * mean[:, None], products, rotation, beta=-1)
        attention = expected_logits(k, mean, covariance).softmax(-1)
        norms = torch.linalg.vector_norm(v, dim=-1, dtype=torch.float32)
        scores = (attention.view(kv_heads, -1, length - sinks).mean(1) + self.epsilon) * norms
        return torch.cat((rotations.pinned, pin_last(scores, self.recent)), 1)

    def _rotations_for(self, k: Tensor) -> _Rotations:
        """Return the rotations for the keys k [G, N, D] after the sinks; those of the latest length are kept."""
        key = self.rope, k.shape, k.device
        if self._latest is None or self._latest[0] != key:
            self._latest = None  # frees the tables before new ones take memory
            kv_heads, tokens, head_dim = k.shape
            tables = self.rope(torch.arange(self.sinks, self.sinks + tokens + self.future, device=k.device))
            future = Rotation(*(table[tokens:].mean(0) for table in tables))
            mean = rotate_rows(torch.eye(head_dim, device=k.device), future)
            pinned = torch.full((kv_heads, self.sinks), torch.inf, device=k.device)
            of_tokens = Rotation(*(table[:tokens] for table in tables))
            self._latest = key, _Rotations(of_tokens, mean, mean / tokens, pinned)
        return self._latest[1]
