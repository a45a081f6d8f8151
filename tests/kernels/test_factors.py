"""The step of low-rank factors: the kernel against the reference. tests/methods/test_lrqk.py has the paper's.

Small systems of equations: against float64, and what matrices without an inverse give.
"""

import pytest
import torch

from sparsecache.kernels._triton import force_backend
from sparsecache.kernels.factors import reduce_token, sum_products, update_bases
from sparsecache.kernels.least_squares import factorise, solve

DTYPES = [torch.float16, torch.float32, torch.bfloat16][: 3 if torch.cuda.is_available() else 2]
CASES = {  # slots, batch, KV heads, query heads per KV head, channels, rank, iterations
    "one": (1, 1, 1, 1, 8, 1, 1),
    "odd sizes": (4, 3, 2, 3, 24, 5, 2),
    "a rank of 16": (2, 1, 2, 6, 40, 16, 1),
}
if torch.cuda.is_available():
    CASES |= {"large": (9, 8, 8, 4, 128, 16, 2), "a rank of 32": (3, 3, 2, 6, 128, 32, 2)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_equals_the_reference(case, dtype, device) -> None:
    slots, batch, kv_heads, group, head_dim, rank, iterations = case
    generator = torch.Generator().manual_seed(rank)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device)

    tokens, keys = draw(slots, kv_heads, 30, rank), draw(slots, kv_heads, 30, head_dim)
    products, gram = keys.mT @ tokens, tokens.mT @ tokens
    bases = [draw(slots, kv_heads, rank, head_dim) for _ in range(2)]
    heads = draw(batch, (group + 2) * kv_heads, 1, head_dim).to(dtype)
    q, k, _ = heads.tensor_split((group * kv_heads, (group + 1) * kv_heads), dim=1)
    order = torch.randperm(slots, generator=generator)[:batch].to(device)
    seq_lens = torch.arange(28, 28 + slots, device=device)  # of 30: a full slot overwrites its last row
    found = []
    for backend in ("kernels", "reference"):
        copies, reduced_keys = [basis.clone() for basis in bases], tokens.to(dtype, copy=True)
        with force_backend(backend):
            reduced = reduce_token(q, k, *copies, products, gram, reduced_keys, seq_lens, order, iterations)
            update_bases(q, k, *reduced, *copies, order)
        appended = reduced_keys[order, :, seq_lens[order].clamp(max=29)]
        assert torch.equal(appended, reduced[1][:, :, 0].to(dtype))
        assert int((reduced_keys != tokens.to(dtype)).any(3).sum()) == batch * kv_heads
        assert reduced[0].shape == (batch, group * kv_heads, 1, rank) and reduced[1].shape == (batch, kv_heads, 1, rank)
        found.append([*reduced, *copies])
    for kernel, reference in zip(*found, strict=True):
        torch.testing.assert_close(kernel, reference, rtol=2e-3, atol=2e-4)
    free = [slot for slot in range(slots) if slot not in order.tolist()]
    for basis, updated in zip(bases, found[0][2:], strict=True):
        assert torch.equal(basis[free], updated[free]) and not torch.equal(basis[order], updated[order])


PROMPTS = {"odd sizes": (2, 24, 5, 2), "a rank of 16": (1, 16, 16, 1)}  # KV heads, channels, rank, iterations
if torch.cuda.is_available():
    PROMPTS |= {"large": (8, 128, 16, 2), "wide": (2, 256, 16, 2)}


@pytest.mark.parametrize("case", PROMPTS.values(), ids=PROMPTS)
def test_the_kernel_factorises_a_prompt_as_the_reference(case, device) -> None:
    """The last factor starts as zeros, and stays so."""
    kv_heads, head_dim, rank, iterations = case
    generator = torch.Generator().manual_seed(head_dim)
    tokens = [torch.randn(kv_heads, 3 * head_dim, head_dim, generator=generator) for _ in range(2)]
    grams = [(x.mT @ x).to(device) for x in tokens]
    start = torch.eye(head_dim)[torch.randperm(head_dim, generator=generator)[:rank]].repeat(kv_heads, 1, 1).to(device)
    start[:, rank - 1] = 0
    found = []
    for backend in ("kernels", "reference"):
        with force_backend(backend):
            found.append(factorise(*grams, start, iterations))
    for kernel, reference in zip(*found, strict=True):
        assert (kernel - reference).norm() <= 2e-4 * reference.norm()
        assert not kernel[:, rank - 1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_those_of_the_selected_tokens_and_the_new_one(dtype, device) -> None:
    generator = torch.Generator().manual_seed(2)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    keys, reduced_keys = draw(3, 2, 90, 24), draw(3, 2, 90, 5)
    k, reduced_key = draw(2, 2, 1, 24), draw(2, 2, 1, 5).float()
    sources, slots = torch.tensor([2, 1], device=device), torch.tensor([0, 3], device=device)
    positions = torch.stack([torch.randperm(90, generator=generator)[:80] for _ in range(4)]).view(2, 2, 80).to(device)
    counts = torch.tensor([[0, 1], [80, 67]], device=device)
    for backend in ("kernels", "reference"):
        products, gram = torch.ones(4, 2, 24, 5, device=device), torch.ones(4, 2, 5, 5, device=device)
        with force_backend(backend):
            sum_products(k, reduced_key, keys, reduced_keys, sources, slots, positions, counts, products, gram)
        for b, (source, slot) in enumerate(((2, 0), (1, 3))):
            for g in range(2):
                rows = positions[b, g, : counts[b, g]]
                of_keys = torch.cat((keys[source, g, rows], k[b, g])).double()
                reduced = torch.cat((reduced_keys[source, g, rows].double(), reduced_key[b, g].double()))
                torch.testing.assert_close(products[slot, g].double(), of_keys.mT @ reduced, rtol=1e-4, atol=1e-3)
                torch.testing.assert_close(gram[slot, g].double(), reduced.mT @ reduced, rtol=1e-4, atol=1e-3)
        assert (products[1:3] == 1).all() and (gram[1:3] == 1).all()


@pytest.mark.parametrize(("batch", "size", "columns"), [((3, 2), 16, 1), ((2,), 5, 7), ((1, 1), 1, 3)])
def test_solutions_are_those_in_double_precision(batch, size, columns, device) -> None:
    generator = torch.Generator().manual_seed(size)
    factor = torch.randn(*batch, 3 * size, size, generator=generator)
    matrix, right = (factor.mT @ factor).to(device), torch.randn(*batch, size, columns, generator=generator).to(device)
    expected = torch.linalg.solve(matrix.double(), right.double())
    torch.testing.assert_close(solve(matrix, right).double(), expected, rtol=1e-3, atol=1e-5)


def test_a_matrix_without_an_inverse_gives_a_small_solution(device) -> None:
    """Of rank 2, with right sides that have an exact solution; and of zeros."""
    generator = torch.Generator().manual_seed(1)
    factor = torch.randn(2, 6, generator=generator)
    matrix = torch.stack((factor.mT @ factor, torch.zeros(6, 6))).to(device)
    wanted = torch.stack((factor.mT @ torch.randn(2, 4, generator=generator), torch.zeros(6, 4))).to(device)
    right = matrix @ wanted
    found = solve(matrix, right)
    assert found[0].norm() <= 1.5 * wanted[0].norm() and not found[1].any()
    torch.testing.assert_close(matrix @ found, right, rtol=1e-2, atol=1e-2)
