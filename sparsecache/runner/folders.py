"""Checks that all runs below one model's folder are of the same checkpoint."""

from pathlib import Path
from typing import Any

from sparsecache.errors import UsageError
from sparsecache.files import list_folder
from sparsecache.longbench.records import RunFolder
from sparsecache.longbench.run_record import RUN_FILE


def check_same_checkpoint(folder: Path, checkpoint: str, fingerprint: str, overwrite: bool) -> None:
    """Raises UsageError if a run beside `folder`, or in it, is of another checkpoint that has the same name.

    `checkpoint` is a hub id or an absolute path. A checkpoint at the same location whose files have changed does
    not count: only its own run folder refuses it. With `overwrite` the run in `folder` does not count.
    """
    if not folder.parent.is_dir():
        return
    for sibling in list_folder(folder.parent):
        if not (sibling / RUN_FILE).is_file() or (overwrite and sibling == folder):
            continue
        try:
            record = RunFolder(sibling).read()
        except UsageError:  # its own command or the evaluation reports it
            continue
        known = record.get("identity", {}).get("checkpoint")
        location = checkpoint_of(record)
        if known not in (None, fingerprint) and location not in (None, checkpoint):
            raise UsageError(
                f"{sibling} holds a run of another checkpoint with the same name: {location}, and this run is of "
                f"{checkpoint}. Give this checkpoint a folder of its own with --model_name."
            )


def checkpoint_of(record: dict[str, Any]) -> str | None:
    """The hub id or path of the checkpoint that a run's record states; None without one."""
    model = record.get("model", {})
    location: str | None = model.get("hub") or model.get("path")
    return location
