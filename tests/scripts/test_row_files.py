"""scripts/write_sample.py and scripts/select_rows.py never leave files that a run would read wrongly."""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner, Result

Script = Callable[..., Result]


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> Script:
    """Runs a script in this process."""
    return lambda name, *arguments: CliRunner().invoke(load_script(name).main, [str(each) for each in arguments])


def test_sample_files_are_replaced_whole(script: Script, tmp_path: Path) -> None:
    """Another name of the old file keeps its content, so a full disk does, too."""
    files = ["write_sample", "--datasets", "lcc", "--tokens", 256, "--out", tmp_path]
    assert script(*files).exit_code == 0
    os.link(tmp_path / "lcc.jsonl", tmp_path / "old")
    before = (tmp_path / "old").read_bytes()
    assert script(*files, "--seed", 1).exit_code == 0
    assert (tmp_path / "old").read_bytes() == before != (tmp_path / "lcc.jsonl").read_bytes()
    done = script(*files[:-1], "/proc/rows")
    assert done.exit_code == 2 and done.stderr.startswith("Error: --out /proc/rows cannot be written to")


def test_rows_that_cannot_be_read_back_are_not_selected(script: Script, tiny: Path, tmp_path: Path) -> None:
    for dataset in ("longbench_v2", "vt"):
        where = ["--data", "sample", "--datasets", dataset, "--out", tmp_path / "out"]
        done = script("select_rows", "--model", tiny, "--longer_than", 1, *where)
        assert done.exit_code == 2 and "only rows of LongBench can be selected" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_of_an_earlier_selection_is_not_left_among_others(script: Script, tiny: Path, tmp_path: Path) -> None:
    rows = ["--data", "sample", "--datasets", "trec", "--out", tmp_path]
    assert script("select_rows", "--model", tiny, "--longer_than", 1, *rows).exit_code == 0
    done = script("select_rows", "--model", tiny, "--longer_than", 10**6, *rows)
    assert done.exit_code == 2 and "trec.jsonl exists, but no row was chosen for it" in done.stderr
