"""InfiniGen's options: what is refused and what is allowed, and what some of them mean to a method as it is set up."""

import math
from pathlib import Path

import pytest
import torch

from sparsecache.cache.base import Shape
from sparsecache.errors import UsageError
from sparsecache.methods import make_method, parse_options
from sparsecache.methods.infinigen import InfiniGen

CPU = torch.device("cpu")
SHAPE = Shape(layers=3, heads=2, kv_heads=2, head_dim=32)


def _refusal(options: dict[str, str], shape: Shape = SHAPE) -> str:
    """What a user is told."""
    with pytest.raises((UsageError, ValueError)) as refused:
        make_method("infinigen", parse_options("infinigen", options)).check(shape)
    return str(refused.value)


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
        ("partial_weight_ratio", "0.03", "0.03125 to 1"),  # none of 32 columns
        ("dense_layers", "0", "1 or more"),
        ("dense_layers", "4", "1 to 3"),
        ("dense_layers", "-2", "1 or more"),
        ("dense_layers", "1.5", "a whole number"),
        ("capacity", "0", "a share above 0 up to 1, or a whole number"),
        ("capacity", "-3", "a share above 0 up to 1, or a whole number"),
        ("capacity", "2.5", "a share above 0 up to 1, or a whole number"),
        ("capacity", "inf", "a share above 0 up to 1, or a whole number"),
        ("capacity", "nan", "a share up to 1, else a count"),
        ("sinks", "-1", "0 tokens or more"),
        ("recent", "-1", "0 tokens or more"),
        ("gpu_cache", "-1", "0 tokens or more"),
        ("gpu_cache", "8", "offload=true"),
        ("fetch", "median", "mean, per_head"),
        ("eviction", "random", "fifo, lru, counter"),
        ("guess", "luck", "input, own_norm, residual"),
        ("skew", "maybe", "true or false"),
        ("offload", "1", "true or false"),
    ],
)
def test_bad_values_are_refused_with_the_option_its_value_and_what_is_allowed(option, value, allowed) -> None:
    told = _refusal({option: value})
    assert any(f"{option}={written}" in told for written in (value, f"{value}.0", repr(value)))
    assert allowed in told and told.endswith(".")


@pytest.mark.parametrize("name", ["alpha", "budget", "capacity", "partial_weight_ratio"])
def test_nan_is_refused_by_the_class_itself_too(name) -> None:
    with pytest.raises(ValueError, match=f"{name}=nan must be "):
        InfiniGen(**{name: math.nan})


@pytest.mark.parametrize(
    "options",
    [{"alpha": 0.0}, {"alpha": math.inf}, {"budget": 1.0}, {"budget": 2.0}, {"budget": 1e-9}, {"budget": 1e20},
     {"capacity": 1.0}, {"capacity": 1e-9}, {"capacity": 1e20}, {"dense_layers": 3}, {"partial_weight_ratio": 1.0},
     {"partial_weight_ratio": 1 / 32}, {"offload": True, "gpu_cache": 0}, {"sinks": 99, "recent": 99}],
    ids=str,
)  # fmt: skip
def test_the_ends_of_the_ranges_are_allowed(options, play) -> None:
    played = play(SHAPE, (5,), options)
    for _ in range(3):
        played.step()


@pytest.mark.parametrize(
    ("ratio", "head_dim", "columns"),
    [(None, 128, 32), (None, 64, 32), (None, 32, 32), (None, 16, 16), (0.3, 128, 38), (0.2, 64, 12), (0.29, 100, 29)],
)
def test_the_columns_are_the_ratio_times_the_head_size(ratio, head_dim, columns) -> None:
    shape = Shape(2, 2, 1, head_dim)
    method = InfiniGen(partial_weight_ratio=ratio, skew=False, dense_layers=1)
    method.check(shape)
    method.allocate(shape, 1, 9, CPU, torch.float32)
    assert method._partial.columns.shape[-1] == method._partial.keys.shape[-1] == columns


def test_a_skewed_method_that_saw_no_text_says_so() -> None:
    with pytest.raises(RuntimeError, match="calibration text"):
        InfiniGen().allocate(SHAPE, 1, 9, CPU, torch.float32)


def test_new_room_forgets_what_the_old_held(play) -> None:
    options = {"alpha": 3.0, "budget": 6, "capacity": 0.6, "offload": True, "gpu_cache": 5}
    fresh = play(SHAPE, (20,), options, new_tokens=9)
    used = play(SHAPE, (20,), options, new_tokens=9)
    for _ in range(5):
        used.step()
    used.method.allocate(SHAPE, 2, 29, CPU, torch.float32)
    again = play(SHAPE, (20,), options, new_tokens=9, method=used.method)
    for _ in range(8):
        for first, second in zip(fresh.step(), again.step(), strict=True):
            assert first.selected == second.selected and torch.equal(first.out, second.out)


def test_the_bundled_calibration_text_is_there() -> None:
    text = InfiniGen().calibration_text()
    assert text is not None and len(text) > 4000
    assert InfiniGen(skew=False).calibration_text() is None
    assert (Path(__file__).parents[3] / "sparsecache" / "methods" / "infinigen" / "calibration.txt").is_file()
