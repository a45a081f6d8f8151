"""The sweep that prefills each prompt once, against the command line."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner

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


def test_an_unknown_method_is_refused_before_any_run(sweep, tiny: Path):
    done, folder = sweep("sweep_shared", tiny, {"method": ["vanilla", "nope"]})
    assert done.exit_code == 2 and "nope" in done.output and not (folder / "pred").exists()
