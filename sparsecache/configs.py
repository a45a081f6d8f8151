"""Where configs/ lies, and how its tables are read. Knows nothing of what stands in them."""

import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent


def configs_dir() -> Path:
    """The folder of `datasets.toml` and `models.toml`: beside the package in a clone, else where they are installed."""
    cloned = _PACKAGE.parent / "configs"
    return cloned if (cloned / "datasets.toml").is_file() else Path(sys.prefix) / "share" / "sparsecache" / "configs"


def project_dir() -> Path:
    """The folder that relative paths in configs/ are relative to: the one that holds the package."""
    return _PACKAGE.parent


@cache
def read_tables(file_name: str) -> dict[str, dict[str, Any]]:
    """The tables of one file of configs/, by name. Raises tomllib.TOMLDecodeError on a broken file."""
    with (configs_dir() / file_name).open("rb") as file:
        return tomllib.load(file)
