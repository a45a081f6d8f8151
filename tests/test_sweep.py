"""Sweeps: the runs of a small file, one line each, resumed where they stopped, ending in a table and a report."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

Sweep = Callable[..., CompletedProcess[str]]
FILE = """
models = ["demo"]
arguments = ["--datasets", "qasper", "--sample_rows", "2", "--sample_tokens", "256"]

[[methods]]
method = "vanilla"

[[methods]]
method = ["streaming"]
budget = [0.1]
"""


@pytest.fixture
def sweep(run_python: Callable[..., CompletedProcess[str]], repo: Path, tmp_path: Path) -> Sweep:
    """Runs scripts/sweep.py over a file of this text."""

    def run(text: str, *arguments: str, **options: Any) -> CompletedProcess[str]:
        (tmp_path / "sweep.toml").write_text(text)
        return run_python(repo / "scripts" / "sweep.py", "sweep.toml", *arguments, cwd=tmp_path, **options)

    return run


def test_a_sweep_ends_in_a_table_and_a_report(sweep: Sweep, tmp_path: Path) -> None:
    done = sweep(FILE, "--jobs", "2", "--threads", "1", "--out", "out", "--html")
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["vanilla", "streaming-budget=0.1"]
    progress, table = done.stdout.split("\n\n", 1)
    assert [line.partition(":")[0] for line in progress.splitlines()] == [
        f"[{at}/2] demo {name}" for at, name in enumerate(names, 1)
    ]
    assert [line.split()[0] for line in table.splitlines()[2:4]] == names
    rows = json.loads((tmp_path / "out" / "demo.json").read_text())["rows"]
    assert [(row["run"], row["rows"]) for row in rows] == [(name, 2) for name in names]
    assert "| streaming-budget=0.1 |" in (tmp_path / "out" / "demo.md").read_text()
    assert (tmp_path / "out" / "demo.html").read_text().count("<svg") == 3
    assert done.stdout.endswith("Written: out/demo.* (md, json, html)\n")
    predictions = tmp_path / "pred" / "demo" / names[1] / "qasper.jsonl"
    whole = predictions.read_bytes()
    predictions.write_bytes(whole[: whole.index(b"\n") + 1])
    finished = tmp_path / "pred" / "demo" / "vanilla" / "qasper.jsonl"
    before = finished.stat().st_mtime_ns
    assert sweep(FILE, "--jobs", "2", "--threads", "1").returncode == 0
    texts = [[json.loads(line)["pred"] for line in each.splitlines()] for each in (whole, predictions.read_bytes())]
    assert texts[0] == texts[1] and finished.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("models = [", "sweep.toml is no readable TOML file"),
        ('models = ["demo"]', "needs `models` and [[methods]], may have `arguments`, and nothing else"),
        ('models = ["demo"]\nbudget = 1\n[[methods]]\nmethod = "h2o"', "and nothing else"),
        ('models = ["demo"]\n[[methods]]\nbudget = 1', "each of [[methods]] needs a `method`"),
        ('models = ["demo"]\n[[methods]]\nmethod = ["h2o", "h2o"]', "names a run twice: h2o"),
        ('models = "demo"\n[[methods]]\nmethod = "h2o"', "`models` is a list of texts"),
        ('models = ["demo"]\nmethods = "h2o"', "methods are tables ([[methods]])"),
        ('models = ["demo"]\n[[methods]]\nmethod = "h2o"\nbudget = []', "budget = [] must be a value"),
        ('models = ["demo"]\n[[methods]]\nmethod = "h2o"\nbudget = {a = 1}', "budget = {'a': 1} must be a value"),
    ],
)
def test_a_bad_file_is_refused_before_anything_runs(sweep: Sweep, tmp_path: Path, text: str, told: str) -> None:
    done = sweep(text)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("Error: ") and told in done.stderr
    assert not (tmp_path / "pred").exists()


def test_a_report_needs_a_folder(sweep: Sweep) -> None:
    done = sweep(FILE, "--html")
    assert (done.returncode, done.stderr) == (2, "Error: --html needs --out, the folder for the report.\n")


def test_a_run_that_fails_is_said_with_its_log(sweep: Sweep, tmp_path: Path) -> None:
    done = sweep(FILE.replace("[0.1]", "[-1]").replace('[[methods]]\nmethod = "vanilla"\n', ""))
    assert done.returncode == 2 and done.stdout.startswith("[1/1] demo streaming-budget=-1: failed, ")
    assert "streaming-budget=-1 failed (exit code 2); see pred/logs/demo-streaming-budget=-1.log." in done.stderr
    assert "budget=-1.0 must be a share" in done.stderr, "the reason stands in the log's last error, and is repeated"
    assert "Fewer than two runs of demo have predictions" in done.stderr
    assert "budget" in (tmp_path / "pred" / "logs" / "demo-streaming-budget=-1.log").read_text()
