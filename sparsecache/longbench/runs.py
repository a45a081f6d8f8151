"""How a run is named on the command line, and in tables that hold several."""

import os
from collections.abc import Sequence
from pathlib import Path

from sparsecache.errors import UsageError, listed, short
from sparsecache.longbench.run_record import RUN_FILE


def find_run(name: str, pred_dir: Path) -> Path:
    """The folder that `name` stands for: its path, or MODEL/NAME below `pred_dir`. Raises UsageError for neither."""
    for folder in (Path(name), pred_dir / name):
        if name and os.path.isdir(folder):  # False for a name that no file system takes, too
            return folder
    there = sorted(str(path.parent.relative_to(pred_dir)) for path in pred_dir.glob(f"*/*/{RUN_FILE}"))
    raise UsageError(
        f"There is no run {short(name, 200)!r}: neither a folder of that path nor {short(str(pred_dir / name), 200)}. "
        f"Name a folder of predictions, or MODEL/NAME below --pred_dir ({pred_dir} holds: "
        f"{listed(there, none='no run')})."
    )


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as few as tell them apart; a folder that is there twice has its place added."""
    parts = [folder.absolute().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return [name if names.count(name) == 1 else f"{name} ({at})" for at, name in enumerate(names, 1)]
