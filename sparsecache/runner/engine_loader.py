"""Load a run's engine in a worker's process. Imports no Ray."""

import platform
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsecache.engine.base import Engine
from sparsecache.errors import UsageError
from sparsecache.longbench.identity import identity_differences
from sparsecache.runner.context import RunContext
from sparsecache.runner.settings import Settings
from sparsecache.versions import installed_versions


@dataclass(frozen=True)
class EngineLoader:
    """Loads a run's engine in a worker's process.

    identity, versions: the driver's, which the worker must find too. max_rows: the rows of the largest dataset.
    """

    settings: Settings
    identity: dict[str, Any]
    versions: dict[str, str]
    max_rows: int

    def __call__(self) -> tuple[Engine, list[torch.device]]:
        """Return the engine and its devices. Raises UsageError if code, files or devices differ from the driver's."""
        node = platform.node()
        advice = "Install the same on every machine."
        _check_equal(self.versions, installed_versions(), f"The versions on {node} differ", advice)
        context = RunContext(replace(self.settings, workers=1, ray_address=None))
        context.fetch_weights()
        advice = "Give every machine the same clone and the same checkpoint, at the same path."
        _check_equal(self.identity, context.identity(), f"The run on {node} differs", advice)
        return context.engine(self.max_rows), context.devices


def _check_equal(drivers: dict[str, Any], found: dict[str, Any], what: str, advice: str) -> None:
    if differences := list(identity_differences(drivers, found)):
        raise UsageError(f"{what} from the driver's: {'; '.join(differences)}. {advice}")
