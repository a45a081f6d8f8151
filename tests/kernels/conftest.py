"""Compare kernels with their plain torch references: on a GPU if there is one, else in Triton's interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsecache.kernels._triton import AVAILABLE, force_backend

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device on which kernels run."""
    if not AVAILABLE:
        pytest.skip("kernels need a CUDA GPU, or the package triton, whose interpreter runs them on the CPU")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    """The dtype that kernels compute in."""
    if request.param == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter does not multiply bfloat16 matrices: needs a CUDA GPU")
    return request.param


@pytest.fixture(params=[torch.float32, *([torch.float16, torch.bfloat16] if torch.cuda.is_available() else [])])
def gpu_dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtype of kernels that compute alike in every dtype: in the interpreter float32 alone, since it is slow."""
    return request.param


@pytest.fixture(scope="session")
def agree() -> Callable[..., None]:
    """Run a function with kernels and with their references, on fresh copies of its tensors, and compare the results.

    Tensors that the function changes are compared too.
    """

    def compare(function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        results = []
        for backend in ("kernels", "reference"):
            copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
            with force_backend(backend):
                out = function(*copies, **options)
            outs = out if isinstance(out, tuple) else () if out is None else (out,)
            results.append([*outs, *(x for x in copies if isinstance(x, torch.Tensor))])
        for kernel, reference in zip(*results, strict=True):
            assert kernel.shape == reference.shape and kernel.dtype == reference.dtype
            if not kernel.is_floating_point():
                assert torch.equal(kernel, reference)
                continue
            assert kernel.isfinite().all()
            error = (kernel.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-9)
            assert error < TOLERANCE[kernel.dtype], f"relative error {error:.2e}"

    return compare
