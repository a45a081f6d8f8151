"""Where configs/ lies, and how its tables are read. Knows nothing of what stands in them."""

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent


def configs_dir() -> Path:
    """The folder of `datasets.toml` and `models.toml`: inside an installed package, else beside it in a clone."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def project_dir() -> Path:
    """The folder that relative paths in configs/ are relative to."""
    return configs_dir().parent


@cache
def read_tables(file_name: str) -> dict[str, dict[str, Any]]:
    """The tables of one file of configs/, by name. Raises tomllib.TOMLDecodeError on a broken file."""
    with (configs_dir() / file_name).open("rb") as file:
        return tomllib.load(file)
