"""The wheel built from the source distribution predicts the bundled sample, in a folder without the repository."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

OTHER_FILES = (".*", "pred", "tests", "build", "*.egg-info", "__pycache__", "site", "models", "docs")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Path:
    """Return the folder into which the wheel is installed without its requirements."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(repo, folder / "source", ignore=shutil.ignore_patterns(*OTHER_FILES))
    build("build_sdist", folder / "source", folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    build("build_wheel", folder / archive.name.removesuffix(".tar.gz"), folder)
    (wheel,) = folder.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    run([*install, "--disable-pip-version-check", "--target", str(folder / "target"), str(wheel)], folder)
    return folder / "target"


def build(hook: str, source: Path, out: Path) -> None:
    run([sys.executable, "-c", f"from setuptools import build_meta; build_meta.{hook}({str(out)!r})"], source)


def run(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_predicts_and_scores_elsewhere(installed: Path, tmp_path: Path) -> None:
    path = {"PYTHONPATH": str(installed)}
    predict, evaluate = ([sys.executable, str(installed / "bin" / f"longbench-{name}")] for name in ("pred", "eval"))
    rows = ["--data", "sample", "--datasets", "qasper", "--sample_rows", "1", "--sample_tokens", "256"]
    run([*predict, *rows, "--max_new_tokens", "4"], tmp_path, **path)
    assert "qasper" in run([*evaluate, "demo/vanilla"], tmp_path, **path)
    record = json.loads((tmp_path / "pred" / "demo" / "vanilla" / "run.json").read_text())
    assert Path(record["model"]["path"]).is_relative_to(installed)


def test_the_wheel_holds_what_the_package_reads_and_no_tests(installed: Path, repo: Path) -> None:
    package = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    for folder in ("sparsecache", "configs"):
        target = installed / "share" / "sparsecache" if folder == "configs" else installed
        for path in (repo / folder).rglob("*.*"):
            if path.is_file() and path.suffix not in (".pyc", ".yaml") and "sweeps" not in path.parts:
                assert target.relative_to(installed) / path.relative_to(repo) in package, path
    assert not [path for path in package if path.parts[0] in ("tests", "scripts", "examples")]
