"""Releases older than the oldest tested one are refused, newer ones than the newest are warned of, others pass."""

import configparser
import importlib.metadata
import re

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement
from packaging.version import Version

from longbench_pred import main
from sparsecache import versions as project
from sparsecache.errors import UsageError
from sparsecache.versions import TESTED, check_versions

real_version = importlib.metadata.version


def _pretend(monkeypatch, **versions: str | None) -> None:
    def version(name: str) -> str:
        found = versions.get(name, real_version(name))
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


def _required(repo) -> dict[str, Requirement]:
    parser = configparser.ConfigParser()
    parser.read(repo / "setup.cfg", encoding="utf-8")
    lines = [line for line in parser["options"]["install_requires"].split("\n") if line.strip()]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


@pytest.mark.parametrize("name", TESTED)
def test_setup_cfg_requires_the_oldest_tested_release_and_bars_no_newer_one(name, repo) -> None:
    assert str(_required(repo)[name].specifier) == f">={TESTED[name][0]}"


def test_the_oldest_and_the_newest_transformers_are_tested(repo) -> None:
    text = (repo / "scripts" / "test_versions.sh").read_text()
    found = [re.search(rf"^{which}=\(transformers==(\d+\.\d+)", text, re.MULTILINE) for which in ("oldest", "newest")]
    assert tuple(match and match[1] for match in found) == TESTED["transformers"]


@pytest.mark.parametrize("name", ["sentencepiece", "protobuf", "transformers", "torch"])
def test_what_supported_checkpoints_need_is_required_and_pinned(name, repo) -> None:
    pins = dict(line.split("==") for line in (repo / "constraints.txt").read_text().splitlines() if "==" in line)
    assert _required(repo)[name].specifier.contains(pins[name])


def test_what_is_installed_here_is_tested() -> None:
    assert list(check_versions()) == []


@pytest.mark.parametrize(
    "versions",
    [
        {"torch": "2.9.0"}, {"torch": "2.11.0+cu128"}, {"torch": "2.15.1"}, {"torch": "2.13.0a0+git123"},
        {"torch": "2.15"}, {"transformers": "5.10.0"}, {"transformers": "5.17.0"}, {"transformers": "5.24.3"},
    ],
    ids=str,
)  # fmt: skip
def test_tested_versions_pass(versions, monkeypatch) -> None:
    _pretend(monkeypatch, **versions)
    assert list(check_versions()) == []


@pytest.mark.parametrize(
    ("name", "version"), [("torch", "2.8.1"), ("transformers", "4.57.1"), ("transformers", "5.9.9")]
)
def test_older_versions_are_refused_with_the_oldest_tested(name, version, monkeypatch) -> None:
    _pretend(monkeypatch, **{name: version})
    with pytest.raises(UsageError) as refused:
        list(check_versions())
    assert str(refused.value).startswith(f"{name} {version} is too old: {TESTED[name][0]} is the oldest tested")


@pytest.mark.parametrize(
    ("name", "version"),
    [("torch", "2.16.0"), ("torch", "3.0+cpu"), ("torch", "2.100"), ("transformers", "5.25"), ("transformers", "6.0")],
)
def test_newer_versions_are_warned_of_once(name, version, monkeypatch) -> None:
    assert Version(version) > Version(TESTED[name][1])
    _pretend(monkeypatch, **{name: version})
    assert list(check_versions()) == [f"{name} {version} is newer than {TESTED[name][1]}, the newest tested release."]


def test_a_missing_package_is_refused_too(monkeypatch) -> None:
    _pretend(monkeypatch, transformers=None)
    with pytest.raises(UsageError, match="transformers is not installed"):
        list(check_versions())
    assert project.installed_versions()["transformers"] == "is not installed"


def test_the_command_line_refuses_before_it_imports_what_may_not_import(monkeypatch, tmp_path) -> None:
    """A transformers that is too old lacks names that the runner imports: the version must be checked first."""
    _pretend(monkeypatch, transformers="4.57.1")
    monkeypatch.setitem(__import__("sys").modules, "sparsecache.runner.run", None)
    told = CliRunner().invoke(main, ["--model", str(tmp_path)])
    assert told.exit_code == 2
    assert re.search(r"Error: transformers 4\.57\.1 is too old", told.stderr)
