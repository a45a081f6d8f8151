"""Kernels beside their plain torch twins: on a GPU where there is one, else through Triton's interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsecache.kernels._triton import AVAILABLE, running

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run."""
    if not AVAILABLE:
        pytest.skip("kernels need a CUDA GPU, or the package triton, whose interpreter runs them on the CPU")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    """What kernels compute in."""
    if request.param == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter does not multiply bfloat16 matrices: needs a CUDA GPU")
    return request.param


@pytest.fixture(scope="session")
def agree() -> Callable[..., None]:
    """Runs a function with kernels and with their twins, on fresh copies of its tensors, and compares what they give.

    The tensors that it changes are compared too.
    """

    def compare(function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        found = []
        for which in ("kernels", "twins"):
            copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
            with running(which):
                out = function(*copies, **options)
            outs = out if isinstance(out, tuple) else () if out is None else (out,)
            found.append([*outs, *(x for x in copies if isinstance(x, torch.Tensor))])
        for kernel, twin in zip(*found, strict=True):
            assert kernel.shape == twin.shape and kernel.dtype == twin.dtype
            if not kernel.is_floating_point():
                assert torch.equal(kernel, twin)
                continue
            assert kernel.isfinite().all()
            error = (kernel.double() - twin.double()).norm() / twin.double().norm().clamp(min=1e-9)
            assert error < TOLERANCE[kernel.dtype], f"off by {error:.2e}"

    return compare
