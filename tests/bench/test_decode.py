"""scripts/bench.py decode: results beside baselines, methods of any kind, and failures that lose nothing."""

import pytest
import torch

from sparsecache.bench.models import BenchModel
from sparsecache.cache import FullCache

SHORT = ("--tokens", "20", "--new_tokens", "3")


@pytest.mark.parametrize("method", ["vanilla", "infinigen", "quest", "h2o"])
def test_a_method_is_measured_beside_vanilla(decode, method) -> None:
    done, (result,) = decode(*SHORT, "--method", method, "--peers", "vanilla")
    assert done.exit_code == 0, done.output
    assert result["name"] == f"20 tokens, batch 1, {method}" and result["name"] in done.output
    assert result["baselines"]["vanilla"] > 0 and result["roofline_s"] > 0 and result["tokens"] == 1
    assert ("kept" in result["notes"]) and bool(result["notes"]["kept"]) == (method != "vanilla")


def test_a_method_of_ones_own_is_measured_and_needs_no_report(decode, tmp_path) -> None:
    source = """
from dataclasses import dataclass
from sparsecache.methods.random import Random

@dataclass
class Own(Random):
    def report(self, stats):
        return {}
"""
    (tmp_path / "own.py").write_text(source)
    done, (result,) = decode(*SHORT, "--method", tmp_path / "own.py", "-o", "budget=5", "--baselines", "none")
    assert done.exit_code == 0, done.output
    assert result["name"] == "20 tokens, batch 1, own budget=5" and result["roofline_s"] is None


def test_transformers_and_vanilla_are_the_default_baselines_and_a_batch_has_only_own_ones(decode) -> None:
    done, results = decode(*SHORT, "--batch", "1,2", "--method", "h2o")
    assert done.exit_code == 0, done.output
    assert [set(result["baselines"]) for result in results] == [{"vanilla", "transformers"}, {"vanilla"}]
    assert "Measured only with --batch 1, not 2: transformers." in done.stderr
    assert results[1]["tokens"] == 2
    done, (result,) = decode(*SHORT)
    assert set(result["baselines"]) == {"transformers"}
    done, (result,) = decode(*SHORT, "--peers", "streamed")  # the earlier names
    assert set(result["baselines"]) == {"vanilla_offload"}


def test_what_is_kept_and_fetched_follows_the_options(decode) -> None:
    method = ["--method", "infinigen", "-o", "budget=0.1", "-o", "alpha=inf", "-o", "offload=true"]
    done, (result,) = decode(
        "--tokens", "60", "--batch", "2", "--new_tokens", "5", *method, "--baselines", "vanilla,vanilla_offload"
    )
    assert done.exit_code == 0, done.output
    assert result["name"].startswith("60 tokens, batch 2, infinigen budget=0.1 alpha=inf")
    assert result["baselines"].keys() == {"vanilla", "vanilla_offload"}
    assert all(0.07 < kept <= 0.1 for kept in result["notes"]["kept"])
    # 6 tokens of 2 sequences in 2 layers, 2 KV heads, keys and values of 16 channels, 4 bytes each.
    assert result["notes"]["fetched_bytes_per_step"] == pytest.approx(6 * 2 * 2 * 2 * 2 * 16 * 4, rel=0.01)


def test_options_that_vary_share_one_measurement_of_a_baseline(decode, monkeypatch) -> None:
    calls, reference = [], BenchModel.reference
    monkeypatch.setattr(BenchModel, "reference", lambda self: calls.append(1) or reference(self))
    method = ["--method", "infinigen", "-o", "alpha=inf", "--vary", "budget=3,0.5", "--vary", "skew=true,false"]
    done, results = decode("--tokens", "30,40", "--new_tokens", "3", *method, "--baselines", "transformers")
    assert done.exit_code == 0, done.output
    specs = [
        f"infinigen alpha=inf budget={budget} skew={skew}" for budget in ("3", "0.5") for skew in ("true", "false")
    ]
    assert [result["name"] for result in results] == [
        f"{n} tokens, batch 1, {spec}" for n in (30, 40) for spec in specs
    ]
    assert [result["notes"]["kept"][0] for result in results[:4:2]] == pytest.approx([3 / 31, 0.5], rel=0.05)
    for same_workload in (results[:4], results[4:]):
        assert len({result["baselines"]["transformers"] for result in same_workload}) == 1
    assert len(calls) == 2 and results[0]["baselines"] != results[4]["baselines"]


def test_a_baseline_that_fails_is_reported_and_the_rest_is_measured(decode, monkeypatch) -> None:
    def reference(self, **generation):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(BenchModel, "reference", reference)
    done, results = decode("--tokens", "20,30", "--new_tokens", "3")
    assert done.exit_code == 0, done.output
    assert [result["baselines"] for result in results] == [{}, {}]
    assert "Could not measure transformers: OutOfMemoryError: too large" in done.output


def test_results_before_an_interruption_are_saved(decode, monkeypatch) -> None:
    decoder, calls = BenchModel.decoder, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decoder(self, *arguments)

    monkeypatch.setattr(BenchModel, "decoder", interrupted)
    done, (result,) = decode("--tokens", "20,30", "--new_tokens", "3", "--baselines", "none")
    assert (done.exit_code, done.stderr) == (130, "Stopped.\n")
    assert result["name"].startswith("20 tokens")


@pytest.mark.parametrize("when", ["before", "while it runs"])
def test_a_batch_that_does_not_fit_is_not_measured(when, decode, monkeypatch) -> None:
    """Fewer sequences at once than asked for would give a wrong time for the batch."""
    init, attend = FullCache.__init__, FullCache.attend

    def limited_init(self, config, offload=False) -> None:
        if config.slots > 2:
            raise torch.OutOfMemoryError("out of memory")
        init(self, config, offload)

    def limited_attend(self, q, k, v, slots):
        if len(slots) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return attend(self, q, k, v, slots)

    if when == "before":
        monkeypatch.setattr(FullCache, "__init__", limited_init)
    else:
        monkeypatch.setattr(FullCache, "attend", limited_attend)
    done, (result,) = decode(*SHORT, "--batch", "3,2", "--baselines", "none")
    assert done.exit_code == 1
    fits = 2 if when == "before" else 1
    assert f"memory suffices for {fits} of 3 sequences of 23 tokens: give --batch {fits}" in done.stderr
    assert result["name"].startswith("20 tokens, batch 2")


def test_a_profile_is_printed_and_saved(decode, tmp_path) -> None:
    done, _ = decode(*SHORT, "--baselines", "none", "--profile", "--method", "quest")
    assert done.exit_code == 0, done.output
    assert "microseconds per step" in done.output and "aten::" in (tmp_path / "decode-tiny-profile.txt").read_text()
