"""Attention in plain torch against a loop, and the errors it raises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsecache.kernels.attention import (
    attention,
    attention_over_rows,
    prompt_attention,
    prompt_attention_with_logsumexp,
)


def _loop(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention of one query at a time, in float64."""
    batch, heads, queries, head_dim = q.shape
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kv = h * k.shape[1] // heads
            for i in range(queries):
                seen = [
                    j
                    for j in range(k.shape[2])
                    if (mask is None or mask[b, 0, i, j]) and (not causal or j <= i)
                ]  # fmt: skip
                scores = [math.exp(float(q[b, h, i].double() @ k[b, kv, j].double()) / head_dim**0.5) for j in seen]
                for score, j in zip(scores, seen, strict=True):
                    out[b, h, i] += score / sum(scores) * v[b, kv, j].double()
    return out


def _inputs(batch: int, kv_heads: int, group: int, queries: int, length: int, head_dim: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, kv_heads * group, queries, head_dim, generator=generator)
    k, v = (torch.randn(batch, kv_heads, length, head_dim, generator=generator) for _ in "kv")
    mask = torch.rand(batch, 1, queries, length, generator=generator) < 0.6
    mask[..., 0] = True
    return q, k, v, mask


sizes = st.integers(1, 3), st.integers(1, 3), st.sampled_from((1, 2, 3, 5)), st.integers(1, 5), st.integers(1, 9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(*sizes, st.sampled_from((1, 3, 8, 17)), st.sampled_from(("all", "mask", "causal")), st.integers(0, 99))
def test_equals_the_loop(batch, kv_heads, group, queries, length, head_dim, rule, seed) -> None:
    if rule == "causal":
        queries = length
    q, k, v, mask = _inputs(batch, kv_heads, group, queries, length, head_dim, seed)
    options = {"all": {}, "mask": {"mask": mask}, "causal": {"causal": True}}[rule]
    found = attention(q, k, v, **options)
    assert found.shape == q.shape and found.dtype == q.dtype
    torch.testing.assert_close(found.double(), _loop(q, k, v, **options), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize(
    "shape",
    [(2, 1, 0, 7), (2, 1, 0, 8), (1, 1, 0, 7), (3, 1, 0, 7), (2, 4, 0, 7), (2, 2, 0, 7), (0, 7), (7,), (1, 0, 7)],
)  # 0 stands for the number of queries
def test_a_mask_of_another_shape_raises_an_error_with_both_shapes(shape, queries) -> None:
    q, k, v, mask = _inputs(2, 2, 2, queries, 7, 8)
    shape = tuple(size or queries for size in shape)
    if shape == mask.shape:
        assert attention(q, k, v, mask=mask).shape == q.shape
        return
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is checked below)
        attention(q, k, v, mask=torch.ones(shape, dtype=torch.bool))
    assert str(shape) in str(error.value) and str(tuple(mask.shape)) in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_a_mask_of_another_dtype_raises_an_error(dtype) -> None:
    q, k, v, mask = _inputs(2, 2, 2, 3, 7, 8)
    with pytest.raises(ValueError, match=rf"{dtype}.*torch\.bool"):
        attention(q, k, v, mask=mask.to(dtype))


def test_causal_takes_no_mask_and_needs_as_many_queries_as_keys() -> None:
    q, k, v, _ = _inputs(1, 2, 2, 7, 7, 8)
    with pytest.raises(ValueError, match="causal attention takes no mask"):
        attention(q, k, v, mask=torch.ones(1, 1, 7, 7, dtype=torch.bool), causal=True)
    with pytest.raises(ValueError, match="got 3 and 7"):
        attention(q[:, :, :3], k, v, causal=True)


@pytest.mark.parametrize(
    ("k_shape", "v_shape"),
    [
        ((2, 3, 7, 8), (2, 3, 7, 8)),  # heads not a multiple of KV heads
        ((1, 2, 7, 8), (1, 2, 7, 8)),  # another batch
        ((2, 2, 7, 4), (2, 2, 7, 4)),  # another head size
        ((2, 2, 7, 8), (2, 2, 6, 8)),  # fewer values than keys
        ((2, 2, 7, 8), (2, 1, 7, 8)),  # values that would broadcast
    ],
)
def test_shapes_that_do_not_match_are_named_in_the_error(k_shape, v_shape) -> None:
    q = torch.zeros(2, 4, 5, 8)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        attention(q, torch.zeros(k_shape), torch.zeros(v_shape))
    assert all(str(shape) in str(error.value) for shape in ((2, 4, 5, 8), k_shape, v_shape))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(*sizes[:3], sizes[4], st.sampled_from((1, 3, 8, 17)), st.integers(0, 99))
def test_attention_over_rows_of_a_mask(batch, kv_heads, group, length, head_dim, seed) -> None:
    q, k, v, _ = _inputs(batch, kv_heads, group, 1, length, head_dim, seed)
    mask = torch.rand(batch, kv_heads, length, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[..., -1] = True
    found = attention_over_rows(q, k, v, mask)
    assert found.shape == q.shape and found.dtype == q.dtype
    for b in range(batch):
        for kv in range(kv_heads):
            heads = slice(kv * group, (kv + 1) * group)
            some = [x[b : b + 1, kv : kv + 1, mask[b, kv]] for x in (k, v)]
            expected = _loop(q[b : b + 1, heads], *some)[0]
            torch.testing.assert_close(found[b, heads].double(), expected, rtol=1e-4, atol=1e-5)


def test_a_mask_of_all_rows_equals_no_mask() -> None:
    q, k, v, mask = _inputs(3, 2, 4, 1, 9, 8)
    for all_rows in (None, torch.ones(3, 2, 9, dtype=torch.bool)):
        torch.testing.assert_close(attention_over_rows(q, k, v, all_rows), attention(q, k, v))
    torch.testing.assert_close(attention_over_rows(q, k, v, mask[:, :, 0]), attention(q, k, v, mask=mask))


def test_prompt_attention_on_a_cpu_has_no_logsumexp() -> None:
    q, k, v, _ = (x[0] for x in _inputs(1, 2, 2, 9, 9, 8))
    out, logsumexp = prompt_attention_with_logsumexp(q, k, v)
    assert logsumexp is None
    assert torch.equal(out, prompt_attention(q, k, v))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kv_heads", "group", "length", "head_dim"), [(8, 4, 1024, 128), (3, 1, 700, 64)])
def test_logsumexp_is_that_of_dense_scores(kv_heads, group, length, head_dim, dtype) -> None:
    q, k, v, _ = (x[0] for x in _inputs(1, kv_heads, group, length, length, head_dim))
    q, k, v = (x.to("cuda", dtype) for x in (3 * q, k, v))
    out, logsumexp = prompt_attention_with_logsumexp(q, k, v)
    torch.testing.assert_close(out, prompt_attention(q, k, v))
    scores = q.float() @ k.float().repeat_interleave(group, 0).mT / head_dim**0.5
    expected = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(logsumexp, expected, rtol=1e-4, atol=1e-3)
