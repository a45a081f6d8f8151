"""Methods over quantised keys and values, against attention over tokens that are quantised one group at a time."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsecache.cache.base import CacheMethod, Shape
from sparsecache.cache.model_cache import ModelCache
from sparsecache.errors import UsageError
from sparsecache.kernels._triton import AVAILABLE, force_backend
from sparsecache.methods import parse_options
from sparsecache.methods.adakv import AdaKV
from sparsecache.methods.kivi import KIVI
from sparsecache.methods.lrqk import LRQK
from sparsecache.methods.oracle import Oracle
from sparsecache.methods.quest import Quest
from sparsecache.methods.snapkv import SnapKV
from sparsecache.methods.tidaldecode import TidalDecode
from tests.methods.presses import kept_by_method
from tests.methods.stepping import Kept, Text, budget_tokens, make_cache, random_text, run, shape_of

BITS = {"int2": 2, "int4": 4, "int8": 8}
TEXTS = [(230, 2), (20, 2), (158, 4)]  # the last one fills its tail while it is decoded


def _rounded(x: Tensor, bits: int) -> Tensor:
    """Return one group of numbers as its codes give them back."""
    low, step = x.min(), (x.max() - x.min()) / (2**bits - 1)
    return low + ((x - low) / step).round() * step if step else x


def _stored(k: Tensor, v: Tensor, bits: int, group: int, residual: int) -> tuple[Tensor, Tensor]:
    """Return keys and values [n, D] of one KV head as they come back from their storage."""
    k, v = k.clone(), v.clone()
    coded = max(0, len(k) - residual) // group * group
    for channel in range(k.shape[1]):
        for start in range(0, coded, group):
            k[start : start + group, channel] = _rounded(k[start : start + group, channel], bits)
    for token in range(coded):
        for start in range(0, v.shape[1], group):
            v[token, start : start + group] = _rounded(v[token, start : start + group], bits)
    return k, v


def _check(
    method: CacheMethod, bits: int, held: Callable[[Text], Kept], budget: float, group: int = 32, residual: int = 128
) -> None:
    """Check outputs in one layer of two query heads per KV head.

    held: the positions of the prompt that each KV head stores. Of the stored tokens, `budget` are attended to, those
    that come nearest to the best score of one of the queries.
    """
    shape = shape_of(2, layers=1)
    texts = [random_text(shape, prompt, new, seed) for seed, (prompt, new) in enumerate(TEXTS)]
    for text, found in zip(texts, run(method, shape, texts), strict=True):
        kept = held(text)
        for at in range(text.new):
            past = text.prompt + at
            for head, of_head in enumerate(kept):
                positions = [*of_head, *range(text.prompt, past)]
                k, v = _stored(text.k[0, head, positions], text.v[0, head, positions], bits, group, residual)
                q = text.q[0, 2 * head : 2 * head + 2, past]
                scores = q @ k.T / 6**0.5
                margin = (scores - scores.amax(1, keepdim=True)).amax(0)
                best = margin.argsort(descending=True, stable=True)[: budget_tokens(budget, len(positions))]
                k, v = (torch.cat((x[best], new[0, head, past : past + 1])) for x, new in ((k, text.k), (v, text.v)))
                expected = (q @ k.T / 6**0.5).softmax(1) @ v
                out = found.outputs[0][at][2 * head : 2 * head + 2]
                torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)


def _everything(text: Text) -> Kept:
    return [list(range(text.prompt))] * text.k.shape[1]


@pytest.mark.parametrize(("bits", "group", "residual"), [(2, 32, 128), (4, 16, 0), (8, 16, 32)])
def test_kivi_attends_to_dequantised_tokens_and_an_exact_tail(bits, group, residual) -> None:
    _check(KIVI(bits=bits, group=group, residual=residual), bits, _everything, 1.0, group, residual)


@pytest.mark.parametrize("storage", BITS)
def test_the_oracle_selects_by_keys_as_they_are_stored(storage) -> None:
    _check(Oracle(budget=0.1, storage=storage, dense_layers=0), BITS[storage], _everything, 0.1)


@pytest.mark.parametrize("kind", [SnapKV, AdaKV])
def test_what_an_eviction_keeps_is_quantised_in_the_order_of_the_text(kind) -> None:
    """KV heads of Ada-KV keep different counts, so their groups are full at different steps."""
    options = {"budget": 0.9, "window": 8, "dense_layers": 0}

    def held(text: Text) -> Kept:
        return kept_by_method(kind(**options), *text.prompt_of(0))

    _check(kind(**options, storage="int4"), 4, held, 1.0)


@pytest.mark.parametrize("kind", [Quest, TidalDecode, LRQK])
def test_a_selection_of_everything_is_kivi(kind) -> None:
    """Dense, selecting and sparse layers have the same storage."""
    shape = shape_of(2, layers=3)
    texts = [random_text(shape, 158, 4, 1), random_text(shape, 30, 2, 2)]
    method = kind(budget=1.0, storage="int4", dense_layers=1)
    for found, expected in zip(run(method, shape, texts), run(KIVI(bits=4), shape, texts), strict=True):
        for outputs, those in zip(found.outputs, expected.outputs, strict=True):
            torch.testing.assert_close(torch.stack(outputs), torch.stack(those))


def test_quantised_caches_are_smaller() -> None:
    """Of 8,192 tokens of 128 channels, float32: codes, minima and steps, and a tail of 160 tokens."""
    shape = replace(shape_of(2, layers=2), head_dim=128)
    full = make_cache(Oracle(budget=0.1, dense_layers=1), shape, 1, 8192, 100).memory.token_nbytes
    for storage, bits in BITS.items():
        expected = bits / 32 + 2 / 32 + 160 / 8192
        for method in (Oracle(budget=0.1, dense_layers=1, storage=storage), KIVI(bits=bits)):
            found = make_cache(method, shape, 1, 8192, 100).memory.token_nbytes
            assert found / full == pytest.approx(expected, rel=0.03)
    cache = make_cache(KIVI(bits=4), shape, 1, 8192, 100).layers[0]
    token = 2 * 2 * 128 * 4
    assert cache.step_nbytes(1128, 1128).device == 128 * token + 1000 * token * (4 / 32 + 2 / 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, r"^bits=3 must be 2, 4 or 8\.$"),
        ({"group": 24}, r"^group=24 must be 16, 32, 64 or 128\.$"),
        ({"residual": 48}, r"^residual=48 must be 0 or a multiple of group=32\.$"),
        ({"residual": -32}, r"^residual=-32 must be 0 or a multiple"),
    ],
)
def test_options_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        KIVI(**options)


def test_a_storage_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match=r"storage='int3' is not one of full, int8, int4, int2\."):
        parse_options("quest", {"storage": "int3"})


@pytest.mark.parametrize(("bits", "page"), [(2, 16), (4, 16), (4, 48), (8, 32)])
@torch.inference_mode()
def test_kernels_attend_to_pages_of_codes_as_the_reference_attends_to_their_tokens(bits, page) -> None:
    """Also when a group leaves the full-precision tail. The reference selects tokens, the kernels select pages."""
    if not AVAILABLE:
        pytest.skip("needs the package triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = Shape(layers=1, heads=4, kv_heads=2, head_dim=32)
    q, k, v = (torch.randn(h, 227, 32, generator=torch.Generator().manual_seed(h)).to(device).half() for h in (4, 2, 2))
    found = {}
    for backend in ("kernels", "reference"):
        method = Quest(budget=70, page=page, storage=f"int{bits}", dense_layers=0)
        cache = ModelCache(method, shape, [device], 2, 227, 8, torch.float16)
        layer, slots, outputs = cache.layers[0], torch.tensor([1], device=device), []
        with force_backend(backend):
            layer.prefill(1, *(part[:, :219] for part in (q, k, v)))
            cache.start_sequence(1, 219)
            for at in range(219, 227):
                outputs.append(layer.attend(*(part[None, :, at : at + 1] for part in (q, k, v)), slots))
                cache.end_step(slots)
            attends_to_pages = layer.full.kv.attends_to_pages(page)
        assert attends_to_pages == (backend == "kernels")
        found[backend] = torch.cat(outputs).double()
    error = (found["kernels"] - found["reference"]).norm(dim=3) / found["reference"].norm(dim=3)
    assert error.max() < 0.01
