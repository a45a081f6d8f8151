"""Double Sparsity against channels weighed one at a time and scores of one head at a time, in float64."""

import pytest
import torch
from torch import Tensor

from sparsecache.methods.doublesparse import DoubleSparse
from tests.methods.partial_keys import calibrated, calibration_qk, selected
from tests.methods.stepping import check_against, random_texts, shape_of


def _heavy(q: Tensor, k: Tensor, count: int) -> Tensor:
    """Return the columns of the heaviest channels of a KV head; q: [H / G, L, D], k: [L, D]."""
    head_dim = k.shape[1]
    weights = [0.0] * head_dim
    for queries in q.double().tolist():
        for query, key in zip(queries, k.double().tolist(), strict=True):
            weights = [weight + abs(a * b) for weight, a, b in zip(weights, query, key, strict=True)]
    heaviest = sorted(range(head_dim), key=lambda channel: -weights[channel])[:count]
    return torch.eye(head_dim, dtype=torch.float64)[:, heaviest]


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("budget", "channels", "count"), [(0.2, 0.25, 1), (0.5, 3, 3), (7, 0.5, 3), (1.0, 6, 6)])
def test_tokens_are_selected_by_the_heaviest_channels(budget, channels, count, group) -> None:
    shape = shape_of(group)
    qk = calibration_qk(shape)
    method = calibrated(DoubleSparse(budget=budget, dense_layers=1, channels=channels), qk)
    matrices = [[_heavy(*of_head, count) for of_head in zip(q, k, strict=True)] for q, k in qk]
    check_against(
        lambda text, layer: selected(text, layer, budget, matrices[layer]), method, shape, random_texts(shape)
    )


def test_the_calibration_does_not_depend_on_options() -> None:
    """It is kept for all options of a method."""
    qk = calibration_qk(shape_of(2))
    made = [calibrated(method, qk).calibration() for method in (DoubleSparse(), DoubleSparse(5, 0, channels=2))]
    assert torch.equal(*(calibration["projection"] for calibration in made))
