"""Finds the folder configs/ and reads the tables in it."""

import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from sparsecache.errors import UsageError, one_line
from sparsecache.files import read_file

_MAX_BYTES = 2**24
_PACKAGE = Path(__file__).resolve().parent


def configs_dir() -> Path:
    """Returns the folder of `datasets.toml` and `models.toml`: next to the package in a clone, else as installed.

    `pip install --target FOLDER` puts it into that folder, else it is below the environment.
    """
    installed = Path("share", "sparsecache", "configs")
    places = [_PACKAGE.parent / "configs", _PACKAGE.parent / installed, Path(sys.prefix) / installed]
    return next((place for place in places if (place / "datasets.toml").is_file()), places[-1])


def project_dir() -> Path:
    """Returns the base of relative paths in configs/: the folder that contains the package."""
    return _PACKAGE.parent


@cache
def read_tables(file_name: str) -> dict[str, dict[str, Any]]:
    """Returns the tables of one file of configs/, by name. Raises UsageError as `read_tables_of`."""
    return read_tables_of(configs_dir() / file_name)


def read_toml(path: Path) -> dict[str, Any]:
    """Returns the content of a TOML file. Raises UsageError for one that cannot be read or is not TOML."""
    try:
        content = tomllib.loads(read_file(path, _MAX_BYTES).decode("utf-8-sig"))
        repr(content)  # raises ValueError for a number of thousands of digits, which no message could show
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, nested too deeply
        raise UsageError(f"{path} is not valid TOML ({one_line(error)}). Correct it.") from error
    return content


def read_tables_of(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the tables of a TOML file, by name. Raises UsageError for a file that is not TOML, or not of tables."""
    tables = read_toml(path)
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(f"{path}: {name} is not a table. Every entry of this file is one: [{name}].")
    return tables
