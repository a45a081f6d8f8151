"""Loki against principal components by a singular value decomposition, and scores of one head at a time, in float64."""

import pytest
import torch
from torch import Tensor

from sparsecache.methods.loki import Loki
from sparsecache.methods.oracle import Oracle
from tests.methods.partial_keys import calibrated, calibration_qk, selected
from tests.methods.stepping import check_against, random_texts, run, shape_of


def _components(keys: Tensor, count: int) -> Tensor:
    """Return the first principal components of keys [L, D]: [D, count]."""
    centred = keys.double() - keys.double().mean(0)
    return torch.linalg.svd(centred, full_matrices=False).Vh[:count].T


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("budget", "channels", "count"), [(0.2, 0.25, 1), (0.5, 3, 3), (7, 0.5, 3), (1.0, 6, 6)])
def test_tokens_are_selected_by_the_first_components(budget, channels, count, group) -> None:
    shape = shape_of(group)
    qk = calibration_qk(shape)
    method = calibrated(Loki(budget=budget, dense_layers=1, channels=channels), qk)
    matrices = [[_components(keys, count) for keys in k] for _, k in qk]
    check_against(
        lambda text, layer: selected(text, layer, budget, matrices[layer]), method, shape, random_texts(shape)
    )


def test_keys_of_low_rank_need_no_more_channels() -> None:
    """Calibrated on keys of three dimensions, three components give the oracle's selection of such keys."""
    shape = shape_of(2)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q[:3]
    texts = random_texts(shape)
    for text in texts:
        text.k.copy_(text.k[..., :3] @ basis)
    qk = [(q, k[..., :3] @ basis) for q, k in calibration_qk(shape)]
    loki = run(calibrated(Loki(0.3, 0, channels=3), qk), shape, texts)
    for found, expected in zip(loki, run(Oracle(0.3, 0), shape, texts), strict=True):
        for outputs, others in zip(found.outputs, expected.outputs, strict=True):
            torch.testing.assert_close(torch.stack(outputs), torch.stack(others), rtol=1e-4, atol=1e-5)


def test_a_restored_calibration_selects_as_the_first_and_another_models_is_refused() -> None:
    shape = shape_of(2)
    first = calibrated(Loki(0.3, 0), calibration_qk(shape))
    second = Loki(0.3, 0)
    second.restore(first.calibration(), shape)
    texts = random_texts(shape)
    for found, expected in zip(run(second, shape, texts), run(first, shape, texts), strict=True):
        assert all(map(torch.equal, found.outputs[1], expected.outputs[1]))
    with pytest.raises(ValueError, match=r"has the shape \(2, 2, 6, 6\); this model needs \(3, 2, 6, 6\)"):
        Loki().restore(first.calibration(), shape_of(2, layers=3))
    with pytest.raises(ValueError, match="its projection has the shape None"):
        Loki().restore({}, shape)
    broken = {"projection": torch.full((2, 2, 6, 6), torch.nan)}
    with pytest.raises(ValueError, match="not finite"):
        Loki().restore(broken, shape)


@pytest.mark.parametrize(("channels", "told"), [(0, "^channels=0 must be"), (1.5, "^channels=1.5 must be")])
def test_a_number_of_channels_that_is_none_is_refused(channels, told) -> None:
    with pytest.raises(ValueError, match=told):
        Loki(channels=channels)
    with pytest.raises(ValueError, match=r"^channels=7 must be at most 6"):
        Loki(channels=7).check(shape_of(2))


def test_an_uncalibrated_method_raises() -> None:
    with pytest.raises(RuntimeError, match="must be calibrated"):
        run(Loki(0.3, 0), shape_of(2), random_texts(shape_of(2)))
