"""--overwrite deletes nothing before the weights are known to fit."""

from pathlib import Path

import pytest
from click.testing import CliRunner

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
