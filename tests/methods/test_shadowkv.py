"""ShadowKV against pages selected one at a time, and keys rebuilt from a singular value decomposition."""

import math
from dataclasses import replace

import pytest
import torch

from sparsecache.cache.base import Shape
from sparsecache.cache.model_cache import ModelCache
from sparsecache.kernels.rotation import Rotation, rotate_rows, rotate_rows_back
from sparsecache.methods.shadowkv import ShadowKV, _low_rank
from sparsecache.testing.cache_checks import plain_rope
from tests.methods.stepping import (
    Kept,
    Text,
    attend,
    budget_tokens,
    check_budget,
    random_text,
    random_texts,
    run,
    shape_of,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine")
BASE = 50.0  # all channels rotate by more than a little over a prompt


def _method(**options) -> ShadowKV:
    method = ShadowKV(**{"dense_layers": 1, **options})
    method.rope = plain_rope(6, BASE)
    return method


def _exact(text: Text, layer: int, kv: int, method: ShadowKV) -> list[int]:
    """Return the prompt's positions whose keys are stored exactly: the last pages, and pages unlike their mean."""
    budget = min(text.prompt, budget_tokens(method.budget, text.prompt))
    outliers, recent = (int(share * budget) // method.page for share in (method.outliers, method.recent))
    first = max(0, text.prompt // method.page - recent)
    likeness = []
    for at in range(first):
        keys = text.k[layer, kv, at * method.page : (at + 1) * method.page].double()
        likeness.append(min(torch.cosine_similarity(keys, keys.mean(0, keepdim=True), dim=1).tolist()))
    unlike = sorted(range(first), key=lambda at: likeness[at])[:outliers]
    of_outliers = [position for at in unlike for position in range(at * method.page, (at + 1) * method.page)]
    return of_outliers + list(range(first * method.page, text.prompt))


def _kept(text: Text, layer: int, method: ShadowKV) -> list[Kept]:
    kv_heads = range(text.k.shape[1])
    return [[_chosen(text, layer, kv, text.prompt + at, method) for kv in kv_heads] for at in range(text.new)]


def _chosen(text: Text, layer: int, kv: int, past: int, method: ShadowKV) -> list[int]:
    budget = min(text.prompt, budget_tokens(method.budget, text.prompt))
    exact = _exact(text, layer, kv, method)
    chosen = list(range(text.prompt, past))
    last_first = sorted(exact, reverse=True)
    chosen += last_first[:budget]
    left = budget - len(last_first)
    whole = text.prompt // method.page
    pages = [at for at in range(whole) if at * method.page not in exact]
    means = {at: text.k[layer, kv, at * method.page : (at + 1) * method.page].double().mean(0) for at in pages}
    shares = dict.fromkeys(pages, 0.0)
    for head in range(kv * text.group, (kv + 1) * text.group):
        query = text.q[layer, head, past].double() / math.sqrt(text.q.shape[3])
        weights = {at: math.exp(float(query @ mean)) for at, mean in means.items()}
        shares = {at: max(shares[at], weight / sum(weights.values())) for at, weight in weights.items()}
    for at in sorted(pages, key=lambda at: -shares[at]):
        fits = max(0, min(left, method.page))
        chosen += range((at + 1) * method.page - fits, (at + 1) * method.page)
        left -= fits
    return sorted(chosen)


def _with_rebuilt_keys(text: Text, layer: int, method: ShadowKV) -> Text:
    """Return a text whose prompt keys are of a low rank before RoPE, except for those that are stored exactly."""
    rotation = plain_rope(6, BASE)(torch.arange(text.prompt))
    prompt = text.k[layer, :, : text.prompt]
    plain = rotate_rows_back(prompt, rotation).double()  # [G, L, D]
    matrix = plain.transpose(0, 1).flatten(1)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    u, s, vh = u[:, : method.rank], s[: method.rank], vh[: method.rank]
    rebuilt = rotate_rows((u * s @ vh).view(text.prompt, *plain.shape[::2]).transpose(0, 1).float(), rotation)
    keys = text.k.clone()
    for kv in range(len(prompt)):
        exact = _exact(text, layer, kv, method)
        keys[layer, kv, : text.prompt] = rebuilt[kv]
        keys[layer, kv, exact] = prompt[kv, exact]
    return replace(text, k=keys)


def _texts(shape: Shape, rank: int) -> list[Text]:
    """Return texts whose keys before RoPE are of a rank, but for a little noise: the best approximation is distinct."""
    texts = []
    for seed, text in enumerate(random_texts(shape)):
        generator = torch.Generator().manual_seed(seed)
        layers, kv_heads, length, head_dim = text.k.shape
        left = torch.randn(layers, length, rank, generator=generator)
        right = torch.randn(layers, rank, kv_heads * head_dim, generator=generator)
        keys = (left @ right).view(layers, length, kv_heads, head_dim).transpose(1, 2) / rank**0.5 + 0.1 * text.k
        texts.append(replace(text, k=rotate_rows(keys, plain_rope(6, BASE)(torch.arange(length)))))
    return texts


@pytest.mark.parametrize(
    ("group", "options"),
    [
        (1, {"budget": 0.5, "page": 4, "rank": 5, "outliers": 0.3, "recent": 0.2}),
        (2, {"budget": 20, "page": 3, "rank": 2, "outliers": 0.0, "recent": 0.0}),
        (4, {"budget": 30, "page": 8, "rank": 160}),
        (2, {"budget": 0.1, "page": 2, "rank": 4, "outliers": 1.0, "recent": 0.0}),
        (4, {"budget": 1.0, "page": 5, "rank": 3, "outliers": 0.4, "recent": 0.6}),
        (2, {"budget": 500, "page": 100, "rank": 1}),
    ],
)
def test_selected_pages_are_rebuilt_from_a_low_rank_and_others_are_exact(group, options) -> None:
    shape, method = shape_of(group), _method(**options)
    texts = _texts(shape, method.rank)
    for text, found in zip(texts, run(method, shape, texts), strict=True):
        rebuilt, kept = _with_rebuilt_keys(text, 1, method), _kept(text, 1, method)
        assert found.attended[1] == [[len(of_head) for of_head in positions] for positions in kept]
        for at, positions in enumerate(kept):
            expected = attend(rebuilt, 1, text.prompt + at, positions)
            torch.testing.assert_close(found.outputs[1][at], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("length", "rank"), [(300, 20), (300, 1), (15, 20), (300, 48)])
def test_keys_without_a_gap_in_their_spectrum_are_rebuilt_nearly_as_well_as_possible(length, rank, dtype) -> None:
    _check_error(length, rank, dtype, torch.device("cpu"))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_keys_are_rebuilt_as_well_on_a_gpu(dtype) -> None:
    _check_error(300, 20, dtype, torch.device("cuda"))


def _check_error(length: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(rank)
    keys = torch.randn(length, 48, generator=generator) * 0.9 ** torch.arange(48)
    keys = (keys @ torch.linalg.qr(torch.randn(48, 48, generator=generator)).Q).to(device, dtype)
    start = torch.randn(48, rank, dtype=torch.float64, generator=generator).to(device)
    coefficients, basis = _low_rank(keys.view(length, 3, 16), start)
    rebuilt = coefficients.double() @ basis.transpose(0, 1).reshape(rank, 48).double()
    least = torch.linalg.svdvals(keys.double())[rank:].square().sum().sqrt()
    rounding = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype] * keys.double().norm()
    assert (rebuilt - keys).norm() <= torch.hypot(1.03 * least, rounding)


def test_keys_of_zeros_stay_zeros() -> None:
    coefficients, basis = _low_rank(torch.zeros(30, 2, 4), torch.randn(8, 3, dtype=torch.float64))
    assert not coefficients.any() and basis.isfinite().all()


@needs_gpu
@torch.inference_mode()
def test_the_first_step_waits_for_the_basis() -> None:
    """The second run delays the stream that finds the basis."""
    device, shape = torch.device("cuda"), Shape(layers=1, heads=4, kv_heads=2, head_dim=64)
    method = ShadowKV(rank=16, budget=40, outliers=0.0, recent=0.0, dense_layers=0)
    method.rope = lambda positions: Rotation(*(table.to(device) for table in plain_rope(64)(positions.cpu())))
    text = random_text(shape, 90, 1, seed=1)
    outputs = []
    for cycles in (0, 1_000_000_000):  # half a second
        cache = ModelCache(method, shape, [device], 1, 100, 10, torch.float32)
        torch.cuda.synchronize()
        with cache.layers[0].config.deferred.after():
            torch.cuda._sleep(cycles)
        cache.layers[0].prefill(0, *(part.to(device) for part in text.prompt_of(0)))
        cache.start_sequence(0, text.prompt)
        token = (part[None].to(device) for part in text.token_of(0, text.prompt))
        outputs.append(cache.layers[0].attend(*token, torch.tensor([0], device=device)))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("budget", [0.02, 0.3, 1, 13])
def test_no_step_exceeds_the_budget_and_new_tokens_come_on_top(budget) -> None:
    shape = shape_of(2)

    def most(text: Text, past: int) -> int:
        return budget_tokens(budget, text.prompt) + past - text.prompt

    check_budget(_method(budget=budget, dense_layers=0), shape, random_texts(shape), most)


def test_values_in_host_memory_are_the_same() -> None:
    shape = shape_of(2)
    texts = random_texts(shape)
    plain, offloaded = (run(_method(budget=20, page=4, offload=offload), shape, texts) for offload in (False, True))
    for found, expected in zip(offloaded, plain, strict=True):
        assert all(map(torch.equal, found.outputs[1], expected.outputs[1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"^rank=0 must be 1 or more\.$"),
        ({"page": 1025}, r"^page=1025 must be 1 to 1024 tokens\.$"),
        ({"outliers": 1.5}, r"^outliers=1.5 must be a share of the budget, 0 to 1\.$"),
        ({"outliers": 0.6, "recent": 0.5}, r"^outliers=0.6 and recent=0.5 must be at most 1 together\.$"),
    ],
)
def test_options_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        ShadowKV(**options)


def test_a_rank_above_the_channels_of_all_kv_heads_is_refused() -> None:
    """The default is taken as far as it goes: small models have 128 channels."""
    with pytest.raises(ValueError, match=r"^rank=257 must be at most 256, this model's channels of all KV heads\.$"):
        ShadowKV(rank=257).check(Shape(4, 4, 4, 64))
    ShadowKV(rank=256).check(Shape(4, 4, 4, 64))
    ShadowKV().check(Shape(4, 4, 2, 64))
