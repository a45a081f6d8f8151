"""Where configs/ lies, and how its tables are read. Knows nothing of what stands in them."""

import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from sparsecache.errors import UsageError, one_line
from sparsecache.files import read_file

_MOST_BYTES = 2**24
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
    """The tables of one file of configs/, by name. Raises UsageError for a file that is not TOML, or not of tables."""
    path = configs_dir() / file_name
    try:
        tables = tomllib.loads(read_file(path, _MOST_BYTES).decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid TOML ({one_line(error)}). Correct it.") from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(f"{path}: {name} is not a table. Every entry of this file is one: [{name}].")
    return tables
