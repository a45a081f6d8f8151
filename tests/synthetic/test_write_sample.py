"""scripts/write_sample.py writes the rows of `--data sample` as files."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from sparsecache.longbench.data import load_rows, open_source
from sparsecache.longbench.tasks import select_tasks
from sparsecache.synthetic.source import SampleSource

Python = Callable[..., "CompletedProcess[str]"]


def test_the_files_hold_the_rows_of_the_sample(run_python: Python, repo: Path, tmp_path: Path) -> None:
    sizes = ["--rows", 3, "--tokens", 400, "--seed", 5]
    result = run_python(repo / "scripts" / "write_sample.py", "--out", tmp_path / "new" / "rows", *sizes)
    assert result.returncode == 0, result.stderr
    sample = SampleSource(3, 400, 5)
    files = open_source(str(tmp_path / "new" / "rows"), sample=sample)
    for task in select_tasks("all"):
        written, made = load_rows(files, task), load_rows(sample, task)
        assert written.dataset.to_list() == made.dataset.to_list() and len(written.dataset) == 3
        assert written.sha256 == made.sha256


def test_only_the_named_datasets_are_written(run_python: Python, repo: Path, tmp_path: Path) -> None:
    script = repo / "scripts" / "write_sample.py"
    run_python(script, "--out", tmp_path / "code", "--datasets", "code", "--tokens", 300)
    assert sorted(file.name for file in (tmp_path / "code").iterdir()) == ["lcc.jsonl", "repobench-p.jsonl"]


@pytest.mark.parametrize(("option", "value"), [("--datasets", "lccc"), ("--tokens", 255), ("--tokens", 32769)])
def test_a_bad_value_is_a_usage_error_and_writes_nothing(
    option: str, value: str | int, run_python: Python, repo: Path, tmp_path: Path
) -> None:
    result = run_python(repo / "scripts" / "write_sample.py", "--out", tmp_path / "rows", option, value)
    assert (result.returncode, result.stderr.startswith("Error: ")) == (2, True)
    assert str(value) in result.stderr and not (tmp_path / "rows").exists()
