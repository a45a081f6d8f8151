"""Model families, one module each: the file name is the `model_type` of config.json."""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from sparsecache.errors import UsageError

if TYPE_CHECKING:
    from sparsecache.engine.families.base import Family


def family_names() -> list[str]:
    """Return the supported model_types, without importing any family."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def load_family(model_type: str) -> "Family":
    """Return the family of a model_type. Raises UsageError, with the families, if it is unsupported."""
    if model_type not in family_names():
        raise UsageError(
            f"Checkpoints of model_type {model_type!r} are not supported. Supported: {', '.join(family_names())}. "
            f"With --engine transformers any architecture runs (vanilla only)."
        )
    family: Family = importlib.import_module(f"{__name__}.{model_type}").Family()
    return family
