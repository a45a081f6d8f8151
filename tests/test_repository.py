"""Files beside the code: workflows, hooks, citation and the site of the documentation."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import sparsecache


def test_the_workflow_of_the_gate_is_the_documented_one(repo: Path) -> None:
    assert (repo / ".github/workflows/gate.yml").read_bytes() == (repo / "docs/gate.yml").read_bytes()


def test_workflows_and_templates_are_valid_and_run_what_is_there(repo: Path) -> None:
    files = [*(repo / ".github").rglob("*.yml"), repo / ".pre-commit-config.yaml"]
    assert len(files) >= 5 and all(isinstance(yaml.safe_load(file.read_text()), dict) for file in files)
    jobs = yaml.safe_load((repo / ".github/workflows/test.yml").read_text())["jobs"]
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert "scripts/test.sh" in steps and "mkdocs build --strict" in steps


def test_the_citation_and_the_changelog_name_the_version(repo: Path) -> None:
    citation = yaml.safe_load((repo / "CITATION.cff").read_text())
    changelog = (repo / "CHANGELOG.md").read_text(encoding="utf-8")
    (version, date), *_ = re.findall(r"^## ([\d.]+) - (\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)
    assert (citation["version"], str(citation["date-released"])) == (version, date)
    assert sparsecache.__version__ == version


def test_every_page_is_in_the_site(repo: Path) -> None:
    pages = {str(path.relative_to(repo / "docs")) for path in (repo / "docs").rglob("*.md")}
    assert set(re.findall(r"[\w/-]+\.md", (repo / "mkdocs.yml").read_text())) == pages


@pytest.mark.skipif(find_spec("material") is None, reason="mkdocs-material is not installed (extra docs)")
def test_the_site_builds_and_loads_nothing_from_elsewhere(repo: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=repo, env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    loaded = re.findall(r'<(?:script|img|link rel="(?:stylesheet|icon)")[^>]*(?:src|href)="([^"]+)"', page)
    assert loaded and not [address for address in loaded if "//" in address]
    assert "generate" in (tmp_path / "api.html").read_text(encoding="utf-8")
