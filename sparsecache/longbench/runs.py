"""Finds a run by its name on the command line, and names runs in tables."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sparsecache.errors import UsageError, listed, short
from sparsecache.longbench.run_record import RUN_FILE
from sparsecache.longbench.score_types import RunScore


def find_run(name: str, pred_dir: Path) -> Path:
    """Return the folder of a run: the path `name`, or MODEL/NAME below `pred_dir`.

    Raises UsageError.
    """
    for folder in (Path(name), pred_dir / name):
        if name and os.path.isdir(folder):  # unlike Path.is_dir, False for an invalid name
            return folder
    found = sorted(str(path.parent.relative_to(pred_dir)) for path in pred_dir.glob(f"*/*/{RUN_FILE}"))
    advice = ""
    if set(name) & set("*?"):
        below = short(name if Path(name).is_relative_to(pred_dir) else str(pred_dir / name), 200)
        advice = f" To name several runs by a pattern, give paths that the shell expands, without quotes: {below}."
    raise UsageError(
        f"There is no run {short(name, 200)!r}: neither that folder nor {short(str(pred_dir / name), 200)} exists. "
        f"Name a folder of predictions, or MODEL/NAME below --pred_dir ({pred_dir} holds: "
        f"{listed(found, none='no run')}).{advice}"
    )


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest distinct endings of the paths.

    A repeated folder gets its number added.
    """
    parts = [folder.absolute().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return [name if names.count(name) == 1 else f"{name} ({at})" for at, name in enumerate(names, 1)]


def run_names(runs: Sequence[RunScore]) -> list[str]:
    """Return the label of each run or, without one, its short name."""
    names = short_names([run.folder for run in runs])
    return [run.label or name for run, name in zip(runs, names, strict=True)]


def parse_labels(labels: Sequence[str], runs: Sequence[str]) -> dict[str, str]:
    """Return the texts of RUN=TEXT by run; `runs`: as named on the command line.

    Raises UsageError for any other run.
    """
    found = {}
    for label in labels:
        named = [run for run in runs if label.startswith(f"{run}=")]  # a run's own name may hold a =
        text = label[len(max(named, key=len)) + 1 :].strip() if named else ""
        if not text:
            raise UsageError(
                f"--label {short(label, 200)!r} is not RUN=TEXT with one of the runs: {listed(list(runs))}. Name the "
                f"run as in the command."
            )
        found[max(named, key=len)] = text
    return found


def with_label(run: RunScore, label: str | None) -> RunScore:
    """Return a run with a label, if there is one."""
    return replace(run, label=label) if label else run
