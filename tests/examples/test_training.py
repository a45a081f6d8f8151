"""train.py --tiny learns, continues from its state, and exports a checkpoint that loads."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from longbench_pred import main

Runs = tuple[Path, list["CompletedProcess[str]"]]


@pytest.fixture(scope="module")
def runs(
    run_python: Callable[..., "CompletedProcess[str]"], repo: Path, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    """The folder of a tiny checkpoint, and the results of the two runs that trained it."""
    folder = tmp_path_factory.mktemp("training")
    arguments = ["--out", folder / "tiny", "--state", folder / "state.pt", "--minutes", 0.4, "--run_minutes", 0.2]
    small = ["--tiny", "--device", "cpu", "--workers", 1, "--batch_tokens", 2048]
    command = [repo / "examples" / "train_demo" / "train.py", *arguments, *small]
    return folder / "tiny", [run_python(*command) for _ in range(2)]


def test_the_second_run_continues_and_the_loss_falls(runs: Runs) -> None:
    folder, done = runs
    assert [run.returncode for run in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "Continuing" not in done[0].stdout
    assert 50 <= float(re.match(r"Continuing at ([\d.]+)%", done[1].stdout)[1]) < 80  # type: ignore[index]
    first, second = (float(re.search(r"loss ([\d.]+)", run.stdout)[1]) for run in done)  # type: ignore[index]
    assert second < 0.9 * first
    training = json.loads((folder / "training.json").read_text())
    assert 1 <= training["share"] < 1.2
    assert training["tokens"] == 2048 * training["steps"]


def test_the_penalty_applies_in_the_penalised_stage_only(runs: Runs) -> None:
    folder, done = runs
    stages = json.loads((folder / "training.json").read_text())["plan"]["stages"]
    assert [stage["penalised"] for stage in stages] == [False, True]
    lines = [line for run in done for line in run.stdout.splitlines() if " step " in line]
    assert all((" entropy " in line) == (float(line.split("%")[0]) > 70) for line in lines)


def test_transformers_and_the_decoder_generate_the_same_text(runs: Runs, tmp_path: Path) -> None:
    folder, _ = runs
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM" and len(AutoTokenizer.from_pretrained(folder)) == 4096
    data = [
        "--data",
        "sample",
        "--sample_rows",
        "2",
        "--sample_tokens",
        "300",
        "--datasets",
        "hotpotqa,lcc,multifieldqa_zh",
    ]
    out = ["--pred_dir", str(tmp_path), "--name", "run", "--device", "cpu", "--verify", "6"]
    result = CliRunner().invoke(main, ["--model", str(folder), *data, *out])
    assert result.exit_code == 0, result.output
    (session,) = json.loads((tmp_path / "tiny" / "run" / "run.json").read_text())["sessions"]
    assert session["verify"] == {"prompts": 6, "differing": [], "near_ties": 0}
