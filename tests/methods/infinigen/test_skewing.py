"""Skewing matrices: rotations that lose nothing, and gather the norm of queries in the first channels."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sparsecache.methods.infinigen.skewing import skew, skewing_matrix

shapes = pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim"), [(2, 1, 32), (2, 2, 64), (1, 4, 128), (2, 4, 32), (1, 8, 64)]
)


def _queries(kv_heads: int, group: int, length: int, head_dim: int) -> torch.Tensor:
    """Return queries with a few strong directions, not those of the channels, as real queries have."""
    generator = torch.Generator().manual_seed(head_dim + group)
    scale = torch.logspace(1, -1, head_dim)
    mixing = torch.randn(kv_heads, head_dim, head_dim, generator=generator)
    q = torch.randn(kv_heads, group, length, head_dim, generator=generator) * scale
    return q @ mixing[:, None]


@shapes
def test_they_are_orthogonal(kv_heads, group, head_dim) -> None:
    matrices = skewing_matrix(_queries(kv_heads, group, 300, head_dim))
    assert matrices.shape == (kv_heads, head_dim, head_dim) and matrices.dtype == torch.float32
    one = torch.eye(head_dim).expand_as(matrices)
    torch.testing.assert_close(matrices @ matrices.mT, one, rtol=0, atol=1e-5)
    torch.testing.assert_close(matrices.mT @ matrices, one, rtol=0, atol=1e-5)


def test_they_are_orthogonal_for_a_text_of_fewer_tokens_than_channels() -> None:
    matrices = skewing_matrix(_queries(2, 2, 3, 64))
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(64).expand_as(matrices), rtol=0, atol=1e-5)


@shapes
def test_they_are_the_right_singular_vectors_by_falling_singular_value(kv_heads, group, head_dim) -> None:
    q = _queries(kv_heads, group, 300, head_dim)
    matrices = skewing_matrix(q)
    for kv in range(kv_heads):
        stacked = torch.cat(list(q[kv])).double()  # the heads of the group, one below the other
        _, values, rows = torch.linalg.svd(stacked, full_matrices=False)
        agreement = (rows * matrices[kv].T.double()).sum(1).abs()  # singular vectors have no sign
        torch.testing.assert_close(agreement, torch.ones_like(agreement), rtol=0, atol=1e-4)
        torch.testing.assert_close((stacked @ matrices[kv].double()).norm(dim=0), values, rtol=1e-3, atol=1e-3)


@shapes
def test_dense_attention_is_the_same_with_rotated_queries_and_keys(kv_heads, group, head_dim) -> None:
    matrices = skewing_matrix(_queries(kv_heads, group, 300, head_dim))
    q, k, v = (torch.randn(heads, 20, head_dim) for heads in (kv_heads * group, kv_heads, kv_heads))

    def dense(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        k_of, v_of = (x.repeat_interleave(group, 0)[None] for x in (k, v))
        return scaled_dot_product_attention(q[None], k_of, v_of, is_causal=True)

    rotated = dense(skew(q, matrices), skew(k, matrices))
    torch.testing.assert_close(rotated, dense(q, k), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(dense(q, skew(k, matrices)), dense(q, k), atol=1e-2)


@shapes
def test_every_head_uses_the_matrix_of_its_kv_head(kv_heads, group, head_dim) -> None:
    matrices = skewing_matrix(_queries(kv_heads, group, 300, head_dim))
    q, k = torch.randn(3, kv_heads * group, 5, head_dim), torch.randn(3, kv_heads, 5, head_dim)
    for head in range(kv_heads * group):
        torch.testing.assert_close(skew(q, matrices)[:, head], q[:, head] @ matrices[head // group])
    for kv in range(kv_heads):
        torch.testing.assert_close(skew(k, matrices)[:, kv], k[:, kv] @ matrices[kv])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_of_half_precision_give_orthogonal_matrices_too(dtype) -> None:
    matrices = skewing_matrix(_queries(2, 2, 300, 64).to(dtype))
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(64).expand_as(matrices), rtol=0, atol=1e-5)
    assert skew(torch.ones(2, 4, 64, dtype=dtype), matrices).dtype == torch.float32


def test_a_quarter_of_the_channels_holds_most_of_the_norm() -> None:
    """The purpose of the rotation."""
    q = _queries(1, 4, 300, 64)
    matrices = skewing_matrix(q)
    whole, skewed = q.flatten(), (q @ matrices[:, None])[..., :16].flatten()
    assert skewed.norm() > 0.95 * whole.norm() > 1.5 * q[..., :16].norm()
