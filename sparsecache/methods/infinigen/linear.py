"""The map of `guess=linear`: from what guess=residual speculates from, to a layer's own input, by ridge regression.

A layer's normed input is speculated as x + x D, where x is the normed residual stream after the attention of the layer
before. D is fitted on the calibration text. D = 0 is guess=residual, and a strong ridge leads there.

Fitting D is the same as fitting the layer's query weights with a ridge toward them: the solution of a ridge regression
is linear in its targets. So the map can be folded into the weights, and a step costs what guess=residual costs.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, math.inf)
"""Strengths that are tried, as multiples of the mean eigenvalue of X^T X; inf: D = 0."""
_HELD_OUT = 4  # the last quarter of the text decides between the strengths


def fit_speculation_map(residual: Tensor, normed: Tensor, project_query: Callable[[Tensor], Tensor]) -> Tensor:
    """Return D [hidden, hidden] float32 of one layer.

    residual, normed: [L, hidden] over a text; project_query: from such rows to queries. The strength whose queries are
    nearest to the true ones on the last quarter of the text is used to fit D on all of it.
    """
    x, change = residual.double(), normed.double() - residual.double()
    fitted = len(x) - len(x) // _HELD_OUT
    held_out, expected = x[fitted:], project_query(normed[fitted:]).double()
    values, vectors = torch.linalg.eigh(x[:fitted].mT @ x[:fitted])
    solved = vectors.mT @ (x[:fitted].mT @ change[:fitted])
    errors = []
    for strength in RIDGES:
        found = held_out + (held_out @ vectors / (values + strength * values.mean())) @ solved
        errors.append((project_query(found.to(normed.dtype)).double() - expected).square().sum())
    strength = RIDGES[int(torch.stack(errors).argmin())]
    if math.isinf(strength):
        return torch.zeros(x.shape[1], x.shape[1], device=x.device)
    gram = x.mT @ x
    gram.diagonal().add_(strength * gram.diagonal().mean())
    speculation_map: Tensor = torch.linalg.solve(gram, x.mT @ change).float()
    return speculation_map


def check_speculation_map(maps: Tensor | None, layers: int) -> Tensor:
    """Return maps [layers - 1, hidden, hidden] of a file; raise ValueError if they do not fit a model."""
    if maps is None or maps.ndim != 3 or len(maps) != layers - 1 or maps.shape[1] != maps.shape[2]:
        found = None if maps is None else tuple(maps.shape)
        raise ValueError(f"its speculation_map has the shape {found}; this model needs {layers - 1} square matrices.")
    return maps
