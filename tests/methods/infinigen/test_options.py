"""InfiniGen's options: what is refused, what is allowed, and what a method makes of them before the first prompt."""

import math

import pytest
import torch

from sparsecache.cache.base import Shape
from sparsecache.cache.model_cache import ModelCache
from sparsecache.errors import UsageError
from sparsecache.methods import make_method, parse_options
from sparsecache.methods.infinigen import PAPER, InfiniGen
from sparsecache.methods.infinigen.cache import InfiniGenCache
from tests.methods.infinigen.compared import CPU, ComparedRun

SHAPE = Shape(layers=3, heads=2, kv_heads=2, head_dim=32)


def _error(options: dict[str, str], shape: Shape = SHAPE) -> str:
    """Return the error's text."""
    with pytest.raises((UsageError, ValueError)) as caught:
        make_method("infinigen", parse_options("infinigen", options)).check(shape)
    return str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("alpha", "-1", "0 or more"),
        ("alpha", "nan", "0 to inf"),
        ("alpha", "wide", "0 to inf"),
        ("budget", "0", "a share above 0 up to 1, or a whole number"),
        ("budget", "-1", "a share above 0 up to 1, or a whole number"),
        ("budget", "nan", "a share of them up to 1, else a count"),
        ("budget", "1.5", "a share above 0 up to 1, or a whole number"),
        ("budget", "inf", "a share above 0 up to 1, or a whole number"),
        ("partial_weight_ratio", "0", "above 0 and at most 1"),
        ("partial_weight_ratio", "-0.5", "above 0 and at most 1"),
        ("partial_weight_ratio", "1.01", "above 0 and at most 1"),
        ("partial_weight_ratio", "nan", "above 0 to 1"),
        ("partial_weight_ratio", "0.03", "0.03125 to 1"),  # none of 32 channels
        ("partial_bits", "2", "one of 16, 8, 4"),
        ("dense_layers", "0", "1 or more"),
        ("dense_layers", "4", "1 to 3"),
        ("dense_layers", "-2", "1 or more"),
        ("dense_layers", "1.5", "a whole number"),
        ("sinks", "-1", "0 tokens or more"),
        ("recent", "-1", "0 tokens or more"),
        ("gpu_cache", "-1", "0 tokens or more"),
        ("gpu_cache", "8", "offload=true"),
        ("fetch", "median", "mean, per_head"),
        ("guess", "luck", "input, residual"),
        ("preset", "mine", "none, paper"),
        ("top_p", "0", "above 0 and at most 1"),
        ("top_p", "1.1", "above 0 and at most 1"),
        ("group", "best", "max, softmax"),
        ("skew", "maybe", "true or false"),
        ("offload", "1", "true or false"),
    ],
)
def test_bad_values_are_refused_with_the_option_its_value_and_what_is_allowed(option, value, allowed) -> None:
    error = _error({option: value})
    assert any(f"{option}={written}" in error for written in (value, f"{value}.0", repr(value)))
    assert allowed in error and error.endswith(".")


def test_alpha_and_another_way_to_join_query_heads_are_refused_together() -> None:
    assert "group=softmax" in (error := _error({"group": "softmax", "alpha": "5"})) and "alpha=inf" in error
    make_method("infinigen", parse_options("infinigen", {"group": "softmax"}))


@pytest.mark.parametrize(
    ("options", "joined"),
    [
        ({}, "max"),
        ({"alpha": 5.0}, "max"),
        ({"group": "softmax"}, "softmax"),
        ({"preset": "paper", **PAPER}, "max"),
        ({"preset": "paper", **PAPER, "alpha": math.inf}, "max"),
    ],
    ids=str,
)
def test_the_cache_joins_query_heads_as_the_option_says(options, joined) -> None:
    cache = ModelCache(InfiniGen(**{**options, "skew": False}), SHAPE, [CPU] * 3, 1, 9, 9, torch.float32).layers[2]
    assert isinstance(cache, InfiniGenCache) and cache._params.group == joined


def test_a_preset_replaces_defaults_and_given_options_replace_the_preset() -> None:
    defaults, paper = (parse_options("infinigen", options) for options in ({}, {"preset": "paper"}))
    published = {"alpha": 5.0, "partial_weight_ratio": 0.3, "budget": 0.2, "fetch": "mean", "guess": "input"}
    published |= {"partial_bits": 16, "group": "max"}
    assert published.items() <= paper.items() and paper.keys() == defaults.keys()
    given = parse_options("infinigen", {"alpha": "4", "preset": "paper", "budget": "256"})
    assert given == {**paper, "alpha": 4.0, "budget": 256.0}
    unset = {"preset", "offload", "gpu_cache", "calibration_file"}
    assert PAPER.keys() == defaults.keys() - unset, "the preset must not depend on defaults"


@pytest.mark.parametrize("name", ["alpha", "budget", "partial_weight_ratio"])
def test_the_class_itself_refuses_nan_too(name) -> None:
    with pytest.raises(ValueError, match=f"{name}=nan must be "):
        InfiniGen(**{name: math.nan})


@pytest.mark.parametrize(
    "options",
    [{"alpha": 0.0}, {"alpha": math.inf}, {"budget": 1.0}, {"budget": 2.0}, {"budget": 1e-9}, {"budget": 1e20},
     {"dense_layers": 3}, {"partial_weight_ratio": 1.0},
     {"partial_weight_ratio": 1 / 32}, {"partial_bits": 8},
     {"partial_bits": 4, "partial_weight_ratio": 1 / 16}, {"offload": True, "gpu_cache": 0},
     {"offload": True, "gpu_cache": 10**30}, {"sinks": 99, "recent": 99}],
    ids=str,
)  # fmt: skip
def test_the_ends_of_the_ranges_are_allowed(options) -> None:
    run = ComparedRun(SHAPE, (5,), options)
    for _ in range(3):
        run.step()


@pytest.mark.parametrize(
    ("ratio", "head_dim", "channels"),
    [(None, 128, 128), (None, 16, 16), (1.0, 64, 64), (0.25, 128, 32), (0.3, 128, 38), (0.2, 64, 12), (0.29, 100, 29)],
)
def test_the_channels_are_the_ratio_times_the_head_size(ratio, head_dim, channels) -> None:
    shape = Shape(2, 2, 1, head_dim)
    method = InfiniGen(partial_weight_ratio=ratio, partial_bits=16, skew=False, dense_layers=1)
    method.check(shape)
    cache = ModelCache(method, shape, [CPU] * 2, 1, 9, 9, torch.float32).layers[1]
    assert isinstance(cache, InfiniGenCache)
    partial = cache._partial
    assert isinstance(partial.keys, torch.Tensor) and partial.keys.shape[-1] == channels
    assert (partial.projection is None) == (channels == head_dim), "all channels need no projection"
    assert partial.projection is None or partial.projection.shape[-1] == channels


def test_a_skewed_method_without_calibration_raises() -> None:
    with pytest.raises(RuntimeError, match="must be calibrated"):
        ModelCache(InfiniGen(partial_weight_ratio=0.5), SHAPE, [CPU] * 3, 1, 9, 9, torch.float32)


@pytest.mark.parametrize("ratio", [1.0, None])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_all_channels_need_no_calibration(bits, ratio) -> None:
    method = InfiniGen(partial_weight_ratio=ratio, partial_bits=bits)
    assert method.skew and method.calibration_text() is None
    ModelCache(method, SHAPE, [CPU] * 3, 1, 9, 9, torch.float32)


@pytest.mark.parametrize(("bits", "nbytes"), [(16, 32), (8, 16), (4, 8)])
def test_a_step_reads_partial_keys_in_their_bits(bits, nbytes) -> None:
    method = InfiniGen(partial_weight_ratio=0.5, partial_bits=bits, skew=False, dense_layers=1)
    cache = ModelCache(method, SHAPE, [CPU] * 3, 1, 64, 9, torch.bfloat16).layers[1]
    assert isinstance(cache, InfiniGenCache)
    selected = 5 * 2 * 2 * SHAPE.head_dim * 2  # tokens, KV heads, key and value, bytes
    assert cache.step_nbytes(60, 5).device == 60 * 2 * nbytes + selected
    rows = cache._partial.keys if bits == 16 else cache._partial.keys.codes
    assert rows.nbytes == 64 * 2 * nbytes


def test_two_channels_in_a_byte_need_an_even_number() -> None:
    error = _error({"partial_bits": "4", "partial_weight_ratio": "0.09375"})  # 3 of 32 channels
    assert "3 of 32 channels" in error and "partial_bits=8" in error
    for options in ({"partial_bits": "8", "partial_weight_ratio": "0.09375"}, {"partial_bits": "4"}):
        make_method("infinigen", parse_options("infinigen", options)).check(SHAPE)
    with pytest.raises(ValueError, match=r"^partial_bits=5 must be 16, 8 or 4\.$"):
        InfiniGen(partial_bits=5)  # type: ignore[arg-type]


def test_caches_that_a_method_makes_anew_know_nothing_of_the_old_ones() -> None:
    options = {"alpha": 3.0, "budget": 6, "offload": True, "gpu_cache": 5}
    fresh, used = (ComparedRun(SHAPE, (20,), options, new_tokens=9) for _ in range(2))
    for _ in range(5):
        used.step()
    anew = ModelCache(used.cache._method, SHAPE, [CPU] * 3, 2, 29, 9, torch.float32)
    again = ComparedRun(SHAPE, (20,), options, new_tokens=9, cache=anew)
    for _ in range(8):
        for first, second in zip(fresh.step(), again.step(), strict=True):
            assert first.selected == second.selected and torch.equal(first.out, second.out)
    assert again.report(0) == fresh.report(0)


def test_the_bundled_calibration_text_is_there() -> None:
    text = InfiniGen(partial_weight_ratio=0.25).calibration_text()
    assert text is not None and len(text) > 4000
    assert InfiniGen(partial_weight_ratio=0.25, skew=False).calibration_text() is None
    assert InfiniGen(preset="paper", **PAPER).calibration_text() == text
