"""Sums of similarities: the kernels against the reference, and the reference against a loop."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sparsecache.kernels._triton import force_backend
from sparsecache.kernels.similarity import Similarities, similarity_sums

CASES = {"one token": (2, 1, 16), "around a block": (2, 129, 24), "many": (1, 390, 32)}  # KV heads, tokens, head size
if torch.cuda.is_available():
    CASES |= {"long": (8, 4099, 128), "wide": (2, 1500, 256)}


def _keys(case: tuple[int, int, int]) -> Tensor:
    """Return keys around a few directions, most of which have a later similar token, and some no similar one."""
    kv_heads, length, head_dim = case
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(7, head_dim, generator=generator)[torch.randint(7, (length,), generator=generator)]
    noise = torch.randn(length, kv_heads, head_dim, generator=generator)
    return (noise * torch.rand(length, 1, 1, generator=generator) * 3 + centres[:, None]).transpose(0, 1)  # strided


def _early_groups(length: int, head_dim: int) -> Tensor:
    """Return unlike keys, except that the tokens of a few groups are similar, some of them early in the text."""
    generator = torch.Generator().manual_seed(5)
    keys = torch.randn(1, length, head_dim, generator=generator)
    for first, last in ((0, 3), (1, length // 2), (2, length - 1), (length // 3, length // 3 + 1)):
        keys[:, [first, (first + last) // 2, last]] = keys[:, [first]] * 1.5
    # The latest token that is similar to 200 has a later similar one itself, and another candidate is in its block.
    one, other = keys[:, 10].clone(), keys[:, 380].clone()
    keys[:, 20], keys[:, 200] = one + other, one
    return keys


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_and_reference_agree(case, device, gpu_dtype, agree) -> None:
    agree(similarity_sums, _keys(case).to(device, gpu_dtype), 0.5)


def test_kernels_find_a_similar_token_before_those_without_a_later_one(device, gpu_dtype, agree) -> None:
    length = 4099 if device.type == "cuda" else 390
    keys = _early_groups(length, 128).to(device, gpu_dtype)
    agree(similarity_sums, keys, 0.5)
    latest = similarity_sums(keys, 0.5)[1]
    assert latest[0, 200] == 20 and latest[0, length - 1] >= 0 and (latest[0] < 0).any()


def test_results_do_not_depend_on_the_order_of_programs(device) -> None:
    if device.type == "cpu":
        pytest.skip("the interpreter runs programs in one order: needs a CUDA GPU")
    keys = _keys((8, 8192, 128)).to(device, torch.bfloat16)
    first = similarity_sums(keys, 0.5)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, similarity_sums(keys, 0.5), strict=True))


def test_equals_a_loop() -> None:
    keys = _keys((1, 90, 16))
    with force_backend("reference"):
        sums, latest, similarity = similarity_sums(keys, 0.5)
    cosines = cosine_similarity(keys[0, :, None].double(), keys[0].double(), dim=2).fill_diagonal_(0)
    expected = [max((j for j in range(90) if cosines[i, j] > 0.5), default=-1) for i in range(90)]
    assert latest[0].tolist() == expected and -1 in expected
    for i, j in enumerate(expected):
        assert float(similarity[0, i]) == pytest.approx(float(cosines[i, j]) if j >= 0 else 0.0, abs=1e-5)
        counted = [float(cosines[k, i]) for k in range(90) if expected[k] != i]
        assert float(sums[0, i]) == pytest.approx(sum(counted), abs=1e-4)


@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_results_are_written_to_rows_of_larger_tensors(backend, device) -> None:
    keys = _keys((2, 70, 16)).to(device)
    with force_backend(backend):
        expected = similarity_sums(keys, 0.5)
        stored = [torch.full((2, 75), 9, dtype=part.dtype, device=device) for part in expected]
        similarity_sums(keys, 0.5, Similarities(*(part[:, 2:72] for part in stored)))
    for part, result in zip(stored, expected, strict=True):
        torch.testing.assert_close(part[:, 2:72], result)  # on a GPU the reference adds in any order
        assert (part[:, :2] == 9).all() and (part[:, 72:] == 9).all()
