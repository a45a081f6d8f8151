"""Small systems of equations: the kernel against float64, and what matrices without an inverse give."""

import pytest
import torch

from sparsecache.kernels._triton import force_backend
from sparsecache.kernels.solve import solve

both = pytest.mark.parametrize("backend", ["kernels", "reference"])


@both
@pytest.mark.parametrize(("batch", "size", "columns"), [((3, 2), 16, 1), ((2,), 5, 7), ((1, 1), 1, 3), ((2,), 33, 20)])
def test_solutions_are_those_in_double_precision(backend, batch, size, columns, device) -> None:
    generator = torch.Generator().manual_seed(size)
    factor = torch.randn(*batch, 3 * size, size, generator=generator)
    matrix, right = (factor.mT @ factor).to(device), torch.randn(*batch, size, columns, generator=generator).to(device)
    with force_backend(backend):
        found = solve(matrix, right)
    expected = torch.linalg.solve(matrix.double(), right.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


@both
def test_a_matrix_without_an_inverse_gives_a_small_solution(backend, device) -> None:
    """Of rank 2, with right sides that have an exact solution; and of zeros."""
    generator = torch.Generator().manual_seed(1)
    factor = torch.randn(2, 6, generator=generator)
    matrix = torch.stack((factor.mT @ factor, torch.zeros(6, 6))).to(device)
    wanted = torch.stack((factor.mT @ torch.randn(2, 4, generator=generator), torch.zeros(6, 4))).to(device)
    right = matrix @ wanted
    with force_backend(backend):
        found = solve(matrix, right)
    assert found[0].norm() <= 1.5 * wanted[0].norm() and not found[1].any()
    torch.testing.assert_close(matrix @ found, right, rtol=1e-2, atol=1e-2)
