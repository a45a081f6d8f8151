"""Versions outside the tested range are refused with the range; inside it all are fine."""

import importlib.metadata
import re

import pytest
from click.testing import CliRunner

from longbench_pred import main
from sparsecache import versions as project
from sparsecache.errors import UsageError

real_version = importlib.metadata.version


def _pretend(monkeypatch, **versions: str | None) -> None:
    def version(name: str) -> str:
        found = versions.get(name, real_version(name))
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_the_ranges_are_those_of_setup_cfg(repo) -> None:
    text = (repo / "setup.cfg").read_text()
    ranges = project.tested_ranges()
    assert ranges.keys() == {"torch", "transformers"}
    for requirement in ranges.values():
        lower, upper = sorted((clause.operator, clause.version) for clause in requirement.specifier)[::-1]
        assert (lower[0], upper[0]) == (">=", "<"), "a range has two ends"
        assert re.search(rf"^ +{requirement.name}>={lower[1]},<{upper[1]}$", text, re.MULTILINE)


def test_without_a_clone_the_installed_metadata_tells(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("sparsecache.versions._SETUP", tmp_path / "setup.cfg")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["click>=8", "torch>=1,<2", 'x; extra == "y"'])
    assert {name: str(found.specifier) for name, found in project.tested_ranges().items()} == {"torch": "<2,>=1"}


def test_what_is_installed_here_is_in_range() -> None:
    project.check_versions()


@pytest.mark.parametrize(
    "versions",
    [
        {"torch": "2.9.0"}, {"torch": "2.11.0+cu128"}, {"torch": "2.13.1"}, {"torch": "2.13.0a0+git123"},
        {"transformers": "5.10.0"}, {"transformers": "5.17.0"}, {"transformers": "5.23.4"},
    ],
    ids=str,
)  # fmt: skip
def test_versions_in_range_pass(versions, monkeypatch) -> None:
    _pretend(monkeypatch, **versions)
    project.check_versions()


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("torch", "2.8.1"),
        ("torch", "2.14.0"),
        ("torch", "3.0+cpu"),
        ("transformers", "4.57.1"),
        ("transformers", "5.24"),
    ],
)
def test_versions_out_of_range_are_refused_with_the_range(name, version, monkeypatch) -> None:
    _pretend(monkeypatch, **{name: version})
    specifier = str(project.tested_ranges()[name].specifier)
    assert "<" in specifier and ">=" in specifier
    with pytest.raises(UsageError) as refused:
        project.check_versions()
    assert str(refused.value).startswith(f"{name} {version}: the tested range is {specifier}. Install")


def test_a_missing_package_is_refused_too(monkeypatch) -> None:
    _pretend(monkeypatch, transformers=None)
    with pytest.raises(UsageError, match="transformers is not installed: the tested range is"):
        project.check_versions()
    assert project.installed_versions()["transformers"] == "is not installed"


def test_the_command_line_refuses_before_it_imports_what_may_not_import(monkeypatch, tmp_path) -> None:
    """A transformers that is too old lacks names that sparsecache.run imports: the range must be told first."""
    _pretend(monkeypatch, transformers="4.57.1")
    monkeypatch.setitem(__import__("sys").modules, "sparsecache.run", None)
    told = CliRunner().invoke(main, ["--model", str(tmp_path)])
    assert told.exit_code == 2
    assert re.search(r"Error: transformers 4\.57\.1: the tested range is <5.24,>=5.10", told.stderr)
