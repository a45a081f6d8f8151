"""The tested versions of torch and transformers, and the check of what is installed."""

import importlib.metadata
from collections.abc import Iterator

from packaging.version import Version

from sparsecache.errors import UsageError

TESTED = {"torch": ("2.9", "2.15"), "transformers": ("5.10", "5.24")}
"""The oldest and the newest tested release. setup.cfg requires the oldest; scripts/test_versions.sh tests both."""
_ABSENT = "is not installed"


def check_versions() -> Iterator[str]:
    """Yields a warning per package that is newer than the newest tested release.

    Raises UsageError for one that is older than the oldest, or not installed.
    """
    for name, (oldest, newest) in TESTED.items():
        found = _version(name)
        if found == _ABSENT:
            raise UsageError(f"{name} {_ABSENT}. Install it: pip install -c constraints.txt -e .")
        release = Version(found).release
        if release < Version(oldest).release:
            raise UsageError(
                f"{name} {found} is too old: {oldest} is the oldest tested release. Install a newer one: "
                f"pip install -c constraints.txt -e ."
            )
        if release[:2] > Version(newest).release:
            yield f"{name} {found} is newer than {newest}, the newest tested release."


def installed_versions() -> dict[str, str]:
    """Returns the versions of packages that results depend on, for run.json."""
    names = ("sparsecache", *TESTED, "tokenizers", "datasets", "numpy")
    return {name: _version(name) for name in names}


def tokenizing_versions() -> dict[str, str]:
    """Returns the versions of the packages that tokenize, for a run's identity."""
    return {name: _version(name) for name in ("transformers", "tokenizers")}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return _ABSENT
