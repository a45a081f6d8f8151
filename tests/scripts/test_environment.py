"""scripts/environment.sh replaces only environments that it made itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def install(repo: Path, tmp_path: Path):
    """Runs install_environment in a copy of the scripts, with a pip that installs nothing."""
    project = tmp_path / "project"
    (project / "scripts").mkdir(parents=True)
    shutil.copy(repo / "scripts" / "environment.sh", project / "scripts")
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(repo / name, project)
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "pip.py").write_text("")

    def run(venv: Path) -> subprocess.CompletedProcess[str]:
        python = tmp_path / "python"
        python.write_text(
            f'#!/bin/sh\nif [ "$2" = venv ]; then exec {sys.executable} -m venv --without-pip "$3"; fi\n'
            f'exec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        environment = {**os.environ, "VENV": str(venv), "PYTHON": str(python), "PYTHONPATH": str(tmp_path / "pip")}
        return subprocess.run(
            ["bash", "-euc", ". scripts/environment.sh; install_environment"],
            cwd=project,
            env=environment,
            capture_output=True,
            text=True,
        )

    return run


def _own_environment(folder: Path) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / "mine.txt").write_text("kept")
    return folder


def test_an_environment_of_the_users_own_is_left_alone(install, tmp_path) -> None:
    venv = _own_environment(tmp_path / "own")
    told = install(venv)
    assert told.returncode == 1 and f"{venv} was not made by this script" in told.stderr
    assert (venv / "mine.txt").read_text() == "kept" and (venv / "pyvenv.cfg").exists()


def test_a_file_or_another_folder_is_left_alone(install, tmp_path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("kept")
    for place in ("file", "folder"):
        assert install(tmp_path / place).returncode == 1
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "mine.txt").read_text() == "kept"


def test_its_own_is_made_reused_and_replaced(install, tmp_path) -> None:
    venv = tmp_path / "made"
    venv.mkdir()  # an empty folder may become one
    assert install(venv).returncode == 0, install(venv).stderr
    stamp = (venv / ".installed").read_text()
    (venv / "marker").write_text("")
    assert install(venv).returncode == 0 and (venv / "marker").exists()
    (venv / ".installed").write_text("of other requirements\n")
    assert install(venv).returncode == 0 and not (venv / "marker").exists()
    assert (venv / ".installed").read_text() == stamp
