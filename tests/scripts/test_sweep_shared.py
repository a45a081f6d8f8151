"""The sweep that prefills each prompt once, against the command line."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from longbench_pred import main

TIMES = ("prefill_s", "decode_s")


def rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All rows of a run by file, without what differs from run to run."""
    return {
        file.name: [
            {key: value for key, value in json.loads(line).items() if key not in TIMES}
            for line in file.read_text(encoding="utf-8").splitlines()
        ]
        for file in folder.glob("*.jsonl")
    }


def test_every_run_has_the_rows_of_the_command_line_and_one_line_of_the_table(sweep, tiny: Path, tmp_path: Path):
    methods = ({"method": ["vanilla"]}, {"method": ["h2o", "infinigen"], "budget": 20})
    done, folder = sweep("sweep_shared", tiny, *methods)
    assert done.exit_code == 0, done.output
    names = ["vanilla", "h2o-budget=20", "infinigen-budget=20"]
    facts = json.loads((folder / "out" / "tiny.json").read_text())
    assert [fact["run"] for fact in facts["rows"]] == names
    for name in names:
        method, _, option = name.partition("-")
        arguments = ["--model", str(tiny), "--method", method, *(["-o", option] if option else []), "--name", name]
        sample = ["--data", "sample", "--datasets", "qasper,lcc", "--sample_rows", "2", "--sample_tokens", "256"]
        alone = CliRunner().invoke(main, [*arguments, *sample, "--pred_dir", str(tmp_path)])
        assert alone.exit_code == 0, alone.output
        expected = rows(tmp_path / "tiny" / name)
        assert len(expected) == 2 and rows(folder / "pred" / "tiny" / name) == expected
        for other in names[: names.index(name)]:
            assert rows(tmp_path / "tiny" / other) != expected


@pytest.fixture
def sweep_here(repo: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Result]:
    """Runs scripts/sweep_shared.py in this process over these [[methods]]."""
    monkeypatch.syspath_prepend(str(repo / "scripts"))
    script = importlib.import_module("sweep_shared")

    def run(methods: str) -> Result:
        arguments = ["--data", "sample", "--datasets", "qasper", "--sample_rows", "2", "--sample_tokens", "256"]
        text = f"models = [{json.dumps(str(tiny))}]\narguments = {json.dumps(arguments)}\n{methods}"
        (tmp_path / "sweep.toml").write_text(text)
        return CliRunner().invoke(script.main, [str(tmp_path / "sweep.toml"), "--pred_dir", str(tmp_path / "pred")])

    return run


def test_a_method_that_there_is_not_is_refused_before_any_run(sweep_here, tmp_path: Path):
    told = sweep_here('[[methods]]\nmethod = ["vanilla", "nope"]')
    assert told.exit_code == 2 and "nope" in told.stderr and not (tmp_path / "pred").exists()


def test_a_run_that_fails_leaves_the_others_in_the_table(sweep_here):
    told = sweep_here('[[methods]]\nmethod = "vanilla"\n[[methods]]\nmethod = "streaming"\ndense_layers = [0, 99]')
    assert told.exit_code == 1
    assert "streaming-dense_layers=99 failed: Method streaming refuses its options" in told.stderr
    assert [line.split()[0] for line in told.stdout.splitlines()[3:5]] == ["vanilla", "streaming-dense_layers=0"]
    assert "Not in the table: " in told.stdout
