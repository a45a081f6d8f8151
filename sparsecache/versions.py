"""The tested ranges of torch and transformers, read from the project's own metadata, and the check of them."""

import configparser
import importlib.metadata
from pathlib import Path

from packaging.requirements import Requirement

from sparsecache.errors import UsageError

_ABSENT = "is not installed"
_CHECKED = ("torch", "transformers")
_SETUP = Path(__file__).resolve().parent.parent / "setup.cfg"


def tested_ranges() -> dict[str, Requirement]:
    """The requirement on each checked package: from setup.cfg in a clone, else from the installed metadata."""
    if _SETUP.is_file():
        parser = configparser.ConfigParser()
        parser.read(_SETUP, encoding="utf-8")
        lines = parser["options"]["install_requires"].split("\n")
    else:
        lines = importlib.metadata.requires("sparsecache") or []
    requirements = [Requirement(line) for line in lines if line.strip()]
    return {requirement.name: requirement for requirement in requirements if requirement.name in _CHECKED}


def check_versions() -> None:
    """Raises UsageError, with the range in it, if torch or transformers lies outside its tested range."""
    for name, requirement in tested_ranges().items():
        found = _version(name)
        if found == _ABSENT or not requirement.specifier.contains(found.split("+")[0], prereleases=True):
            raise UsageError(
                f"{name} {found}: the tested range is {requirement.specifier}. "
                f"Install one of it: pip install -c constraints.txt -e ."
            )


def installed_versions() -> dict[str, str]:
    """Versions of what a result can depend on, for run.json."""
    names = ("sparsecache", *_CHECKED, "tokenizers", "datasets", "numpy")
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return _ABSENT
