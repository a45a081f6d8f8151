"""The nightly gate: its baselines are of today's runs, options and rows. The gate itself is too slow for a test."""

import json
import math
import re
from pathlib import Path

import yaml

from sparsecache.longbench.tasks import load_tasks
from sparsecache.methods import parse_options
from sparsecache.synthetic.source import SampleSource

SAVE_ANEW = "run `scripts/nightly.sh --save`"


def test_each_run_has_a_baseline_of_todays_options_and_rows(repo: Path, load_script) -> None:
    runs, arguments = load_script("sweep").read_sweep(repo / "configs/sweeps/nightly.toml")
    script = (repo / "scripts/nightly.sh").read_text(encoding="utf-8")
    (gated,) = re.findall(r"^for run in (.*); do$", script, re.MULTILINE)
    assert gated.split() == [run.name for run in runs]
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    source = SampleSource(int(given["--sample_rows"]), int(given["--sample_tokens"]), 0)
    for run in runs:
        baseline = json.loads((repo / f"configs/sweeps/nightly/{run.name}.json").read_text(encoding="utf-8"))
        identity = baseline["identity"]
        options = parse_options(run.method, dict(run.options))
        written = {key: "inf" if value == math.inf else value for key, value in options.items()}
        assert (identity["method"], identity["options"]) == (run.method, written), SAVE_ANEW
        assert set(baseline["datasets"]) == set(given["--datasets"].split(","))
        for name, dataset in baseline["datasets"].items():
            rows = [json.loads(line) for line in source.read(load_tasks()[name], e=False)[1].splitlines()]
            assert set(dataset["scores"]) == {row["_id"] for row in rows}, SAVE_ANEW


def test_the_workflow_runs_the_script(repo: Path) -> None:
    (job,) = yaml.safe_load((repo / ".github/workflows/nightly.yml").read_text())["jobs"].values()
    assert "scripts/nightly.sh" in [step.get("run") for step in job["steps"]]
