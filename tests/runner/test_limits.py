"""Sizes beyond all use are refused by name, before any work."""

import time

import pytest
from click.testing import CliRunner

from longbench_pred import main
from sparsecache.errors import UsageError
from sparsecache.options import LARGEST, constructor_options
from sparsecache.synthetic.source import SampleSource

HUGE = (2**31, 2**63, 10**12, 10**40)


@pytest.mark.parametrize("value", [*map(str, HUGE), "9" * 5000])
@pytest.mark.parametrize(
    "flag",
    ["sample_rows", "sample_tokens", "sample_seed", "max_samples", "max_length", "window", "batch_size", "workers",
     "gpus_per_worker", "verify", "ruler_rows"],
)  # fmt: skip
def test_a_huge_number_is_refused_with_its_flag(flag: str, value: str, tmp_path) -> None:
    began = time.monotonic()
    told = CliRunner().invoke(main, ["--data", "sample", "--pred_dir", str(tmp_path), f"--{flag}", value])
    assert told.exit_code == 2 and f"--{flag}" in told.stderr, told.stderr
    assert "not in the range" in told.stderr or "not a valid" in told.stderr
    assert time.monotonic() - began < 2 and not any(tmp_path.iterdir())


@pytest.mark.parametrize(("rows", "tokens"), [(LARGEST, 256), (3000, 32768)])
def test_a_sample_beyond_memory_is_refused(rows: int, tokens: int, predict) -> None:
    told = predict("--sample_rows", str(rows), "--sample_tokens", str(tokens))
    assert told.exit_code == 2 and f"A sample of {rows} rows of {tokens} tokens is too large" in told.stderr
    with pytest.raises(UsageError, match="too large"):
        SampleSource(rows, tokens)


class _Options:
    def __init__(self, page: int = 16, budget: float = 0.2, window: int | None = None, wide: bool = True):
        pass


@pytest.mark.parametrize("text", [*(str(value) for value in HUGE), str(-(2**31)), "1" * 4000])
def test_an_integer_option_beyond_32_bits_is_refused(text: str) -> None:
    for name in ("page", "window"):
        with pytest.raises(ValueError, match=rf"{name}='.*' is out of range: at most {LARGEST}") as refused:
            constructor_options(_Options)[name].convert(text)
        assert len(str(refused.value)) < 300


def test_a_number_beyond_32_bits_is_refused_but_infinity_is_not() -> None:
    budget = constructor_options(_Options)["budget"]
    for text in ("1e10", "-1e10", "1e300"):
        with pytest.raises(ValueError, match=r"out of range"):
            budget.convert(text)
    assert budget.convert("inf") == float("inf") and budget.convert(str(LARGEST)) == LARGEST
    assert constructor_options(_Options)["page"].convert(str(LARGEST)) == LARGEST


@pytest.mark.parametrize(
    ("method", "option"),
    [("quest", "page"), ("snapkv", "kernel"), ("streaming", "sinks"), ("h2o", "dense_layers"), ("infinigen", "budget")],
)
def test_every_methods_sizes_are_checked_there(method: str, option: str, predict, forbid_weights) -> None:
    forbid_weights()
    told = predict("--method", method, "-o", f"{option}={2**31}")
    assert told.exit_code == 2 and f"{option}='{2**31}' is out of range" in told.stderr, told.stderr
