"""Moments of tokens and expected logits: kernels against references, and references against double precision."""

import pytest
import torch

from sparsecache.kernels import moments as module
from sparsecache.kernels._triton import force_backend
from sparsecache.kernels.moments import expected_logits, token_moments
from sparsecache.kernels.rotation import Rotation, rotate_rows
from sparsecache.testing.cache_checks import plain_rope
from tests.kernels.conftest import TOLERANCE

CASES = {  # KV heads, group, tokens, head size, rotated channels
    "one token": (1, 2, 1, 16, 16),
    "around a block": (2, 1, 129, 24, 16),
    "some splits": (1, 2, 1100, 16, 8),
}
if torch.cuda.is_available():
    CASES |= {"long": (8, 4, 4099, 128, 128), "96 channels": (2, 3, 3000, 96, 48), "wide": (1, 4, 900, 256, 64)}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


def _scaled_rope(length: int, rotated: int, device: torch.device) -> Rotation:
    """Return a rotation that also scales, as YaRN's does."""
    return Rotation(*(1.2 * table.to(device) for table in plain_rope(rotated, 50.0)(torch.arange(length))))


def _heads(count: int, length: int, head_dim: int) -> torch.Tensor:
    """Return heads [count, length, head_dim] with a mean, strided as those of a prompt may be."""
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(length, count, head_dim, generator=generator) + torch.randn(count, head_dim, generator=generator)
    return x.transpose(0, 1)


def test_kernels_agree_with_references(case, device, dtype, agree) -> None:
    kv_heads, group, length, head_dim, rotated = case
    k = _heads(kv_heads, length, head_dim).to(device, dtype)
    agree(token_moments, k, absolute=True)
    rotation = _scaled_rope(length, rotated, device)
    with force_backend("kernels"):
        found = token_moments(k, rotation)
    with force_backend("reference"):
        expected = token_moments(k, rotation)
    for ours, theirs in zip(found, expected, strict=True):  # the kernel rounds tokens to their dtype once more
        assert (ours - theirs).norm() <= TOLERANCE[dtype] * theirs.norm()
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(kv_heads * group, head_dim, generator=generator).to(device)
    covariance = torch.randn(kv_heads * group, head_dim, head_dim, generator=generator).to(device)
    agree(expected_logits, k, mean, covariance @ covariance.mT)


def test_half_precision_keys_do_not_round_the_covariance(device, monkeypatch) -> None:
    """The kernel is as near to double precision as float32 is."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    monkeypatch.setattr(module, "use_kernel", lambda _: True)
    k = _heads(1, 70, 32).to(device, dtype)
    generator = torch.Generator().manual_seed(2)
    mean, root = (torch.randn(*size, generator=generator).to(device) for size in ((2, 32), (2, 32, 32)))
    covariance, keys = root @ root.mT, k[0].double()
    expected = (mean.double() @ keys.mT) / 32**0.5 + ((keys @ covariance.double()) * keys).sum(2) / 64
    torch.testing.assert_close(expected_logits(k, mean, covariance).double(), expected, rtol=2e-4, atol=1e-3)


@pytest.mark.parametrize("rotated", [16, 8])
def test_moments_are_those_before_the_rotation(rotated) -> None:
    x = _heads(3, 40, 16)
    rotation = _scaled_rope(40, rotated, torch.device("cpu"))
    sums, products = token_moments(rotate_rows(x, rotation), rotation)
    torch.testing.assert_close(sums, x.sum(1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(products, x.mT @ x, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(token_moments(x, absolute=True).sums, x.abs().sum(1))


def test_moments_of_groups_are_sums_of_those_of_their_heads(device, agree) -> None:
    x = _heads(6, 70, 16).to(device)
    agree(token_moments, x, absolute=True, groups=2)
    for found, of_heads in zip(token_moments(x, groups=2), token_moments(x), strict=True):
        torch.testing.assert_close(found, torch.stack((of_heads[:3].sum(0), of_heads[3:].sum(0))))
