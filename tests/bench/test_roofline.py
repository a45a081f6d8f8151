"""The bytes that the roofline counts, against arithmetic by hand and against what methods report to have fetched."""

import pytest
import torch

from sparsecache.bench.models import load_bench_model
from sparsecache.bench.roofline import decode_step_nbytes
from sparsecache.cache.base import StepBytes
from sparsecache.methods import load_method, method_names

LAYERS, KV_HEADS, HEAD_DIM, FLOAT = 4, 2, 16, 4  # of the tiny checkpoint
TOKEN = 2 * KV_HEADS * HEAD_DIM * FLOAT  # bytes of a token's keys and values in a layer
PAST = 100.0


@pytest.fixture(scope="module")
def model(tiny):
    return load_bench_model(str(tiny), [torch.device("cpu")], torch.float32)


def step_nbytes(model, method, options=None, *, batch=1, kept=0.1, hit=0.0) -> StepBytes:
    decoder = model.decoder(method, options or {})
    decoder.allocate(batch, 128, 8)
    found = decode_step_nbytes(decoder, PAST, batch, kept, hit)
    assert found is not None
    return found


def test_vanilla_reads_every_token_once(model) -> None:
    for batch in (1, 3):
        expected = batch * PAST * LAYERS * TOKEN
        assert step_nbytes(model, "vanilla", batch=batch, kept=None) == StepBytes(expected)
        offloaded = step_nbytes(model, "vanilla", {"offload": "true"}, batch=batch, kept=None)
        assert offloaded == StepBytes(0, expected)


def test_infinigen_reads_partial_keys_selected_tokens_and_query_weights(model) -> None:
    options = {"partial_bits": "16", "partial_weight_ratio": "0.25", "dense_layers": "1", "skew": "false"}
    sparse, selected = 3, 0.1 * PAST * TOKEN
    partial, query = PAST * TOKEN / 2 * 0.25, 64 * 64 * FLOAT
    for batch in (1, 2):
        expected = batch * (PAST * TOKEN + sparse * (partial + selected)) + sparse * query
        found = step_nbytes(model, "infinigen", options, batch=batch)
        assert (found.device, found.host) == (pytest.approx(expected), 0)
        offloaded = step_nbytes(model, "infinigen", {**options, "offload": "true"}, batch=batch, hit=0.25)
        assert offloaded == StepBytes(pytest.approx(expected), pytest.approx(batch * sparse * 0.75 * selected))


@pytest.mark.parametrize("method", method_names())
def test_no_method_reads_less_than_what_it_attends_to(model, method) -> None:
    vanilla = PAST * LAYERS * TOKEN
    if method == "shadowkv":
        pytest.skip("reads coefficients in place of keys; the test below has its bytes")
    decoder = model.decoder(method, {})
    decoder.allocate(1, 128, 8)
    few, all_tokens = (decode_step_nbytes(decoder, PAST, 1, kept, 0.0) for kept in (0.1, 1.0))
    sparse = sum(cache.sparse for cache in decoder.cache.layers)
    assert (sparse > 0) == (load_method(method).kind not in ("full", "quantised"))
    assert all_tokens.device >= vanilla
    assert few.device >= 0.1 * vanilla
    reads = 2 if method == "lrqk" else 1  # lrqk reads an attended token's key again, and here as many factors
    assert all_tokens.device - few.device == pytest.approx(0.9 * PAST * sparse * reads * TOKEN)


@pytest.mark.parametrize("offload", [False, True])
def test_shadowkv_reads_mean_keys_coefficients_and_values(model, offload) -> None:
    options = {"rank": "12", "page": "4", "dense_layers": "0", "offload": str(offload).lower()}
    kv_heads = model.architecture.shape.kv_heads
    per_layer = PAST / 4 * TOKEN / 2 + 0.1 * PAST * kv_heads * 12 * FLOAT
    values = LAYERS * 0.1 * PAST * TOKEN / 2
    expected = (LAYERS * per_layer, values) if offload else (LAYERS * per_layer + values, 0)
    found = step_nbytes(model, "shadowkv", options, batch=1)
    assert (found.device, found.host) == pytest.approx(expected)


def test_a_sparse_share_that_is_not_known_leaves_the_roofline_unknown(model) -> None:
    decoder = model.decoder("streaming")
    decoder.allocate(1, 128, 8)
    assert decode_step_nbytes(decoder, PAST, 1, None, 0.0) is None


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "vanilla", "-o", "offload=true"],
        ["--method", "infinigen", "-o", "offload=true", "-o", "alpha=inf", "-o", "budget=9"],
        ["--method", "infinigen", "-o", "offload=true", "-o", "alpha=inf", "-o", "budget=9", "-o", "gpu_cache=12"],
    ],
    ids=["vanilla", "infinigen", "with a GPU cache"],
)
def test_host_bytes_are_those_that_the_method_reports_to_have_fetched(decode, options) -> None:
    done, (result,) = decode("--tokens", "60", "--batch", "2", "--new_tokens", "9", "--baselines", "none", *options)
    assert done.exit_code == 0, done.output
    notes = result["notes"]
    assert notes["step_cache_bytes"]["host"] == pytest.approx(notes["fetched_bytes_per_step"], rel=0.01) and (
        notes["fetched_bytes_per_step"] > 0
    )
