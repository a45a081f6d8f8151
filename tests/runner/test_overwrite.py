"""--overwrite deletes nothing before the engine is loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from longbench_pred import main
from sparsecache.testing.random_checkpoint import make_random_checkpoint


@pytest.mark.parametrize("damage", ["truncated", "missing", "another shape"])
def test_a_run_that_cannot_start_keeps_the_old_rows(damage, tmp_path: Path) -> None:
    folder = make_random_checkpoint(tmp_path / "model")
    command = ["--model", str(folder), "--data", "sample", "--datasets", "trec", "--sample_rows", "1"]
    command += ["--sample_tokens", "256", "--pred_dir", str(tmp_path / "pred")]
    assert CliRunner().invoke(main, command).exit_code == 0
    (rows,) = (tmp_path / "pred").rglob("trec.jsonl")
    before = rows.read_bytes()
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "missing":
        weights.unlink()
    else:
        weights.unlink()
        (make_random_checkpoint(tmp_path / "other", hidden_size=32) / "model.safetensors").rename(weights)
    told = CliRunner().invoke(main, [*command, "--overwrite"])
    assert told.exit_code == 2, told.output
    assert rows.read_bytes() == before


def _empty(weights: Path, cache: Path) -> None:
    for file in cache.rglob("*.safetensors"):
        file.write_bytes(b"")


def _nan_calibration(weights: Path, cache: Path) -> None:
    from safetensors import safe_open

    for file in cache.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        save_file({name: tensor * torch.nan for name, tensor in load_file(file).items()}, file, metadata)


def _nan_weights(weights: Path, cache: Path) -> None:
    save_file({name: tensor * torch.nan for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})


@pytest.mark.parametrize("damage", [_empty, _nan_calibration, _nan_weights])
def test_a_calibration_that_cannot_be_used_keeps_the_old_rows(
    damage: Callable[[Path, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSECACHE_CACHE", str(tmp_path / "cache"))
    folder = make_random_checkpoint(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The lighthouse keeper counted the ships. " * 9)
    command = ["--model", str(folder), "--data", "sample", "--datasets", "trec", "--sample_rows", "1", "--method"]
    command += ["infinigen", "-o", f"calibration_file={tmp_path / 'text.txt'}", "-o", "partial_weight_ratio=0.5"]
    command += ["--sample_tokens", "256"]
    command += ["--pred_dir", str(tmp_path / "pred"), "--name", "run"]
    assert CliRunner().invoke(main, command).exit_code == 0
    (rows,) = (tmp_path / "pred").rglob("trec.jsonl")
    before = rows.read_bytes()
    damage(folder / "model.safetensors", tmp_path / "cache")
    told = CliRunner().invoke(main, [*command, "--overwrite"])
    assert told.exit_code == 2 and "calibration" in told.stderr, told.output
    assert rows.read_bytes() == before
