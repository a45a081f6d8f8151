"""The latest similar token: the kernel against the reference, and the reference against a loop."""

import pytest
import torch

from sparsecache.kernels.similarity import latest_similar

CASES = {"one token": (2, 1, 16), "around a block": (2, 129, 24), "many": (1, 300, 32)}  # KV heads, tokens, head size
if torch.cuda.is_available():
    CASES |= {"long": (8, 4099, 128), "wide": (2, 1500, 256)}


def _keys(case) -> torch.Tensor:
    kv_heads, length, head_dim = case
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(7, head_dim, generator=generator)[torch.randint(7, (length,), generator=generator)]
    noise = torch.randn(length, kv_heads, head_dim, generator=generator)
    return (noise * torch.rand(length, 1, 1, generator=generator) * 3 + centres[:, None]).transpose(0, 1)  # strided


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_and_reference_agree(case, device, gpu_dtype, agree) -> None:
    agree(latest_similar, _keys(case).to(device, gpu_dtype), 0.5)


def test_equals_a_loop() -> None:
    keys = _keys((1, 90, 16))
    latest, similarity = latest_similar(keys, 0.5)
    cosines = torch.nn.functional.cosine_similarity(keys[0, :, None].double(), keys[0].double(), dim=2)
    expected = [max((j for j in range(90) if j != i and cosines[i, j] > 0.5), default=-1) for i in range(90)]
    assert latest[0].tolist() == expected and -1 in expected
    for i, j in enumerate(expected):
        assert float(similarity[0, i]) == pytest.approx(float(cosines[i, j]) if j >= 0 else 0.0, abs=1e-5)
