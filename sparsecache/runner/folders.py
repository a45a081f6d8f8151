"""Check that all runs below one model's folder are of the same checkpoint."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from sparsecache.errors import UsageError
from sparsecache.files import list_folder
from sparsecache.longbench.records import RunFolder
from sparsecache.longbench.run_record import RUN_FILE


def check_same_checkpoint(folder: Path, checkpoint: str, fingerprint: str, overwrite: bool) -> None:
    """Raise UsageError if a run beside `folder`, or in it, is of another checkpoint that has the same name.

    `checkpoint` is a hub id or an absolute path. A checkpoint at the same location whose files have changed does
    not count: only its own run folder refuses it. With `overwrite` the run in `folder` does not count.
    """
    if not folder.parent.is_dir():
        return
    for sibling in list_folder(folder.parent):
        if overwrite and sibling == folder:
            continue
        try:
            status = (sibling / RUN_FILE).stat()
        except OSError:  # not a run
            continue
        known, location = _recorded_checkpoint(sibling, status.st_mtime_ns, status.st_size)
        if known not in (None, fingerprint) and location not in (None, checkpoint):
            raise UsageError(
                f"{sibling} holds a run of another checkpoint with the same name: {location}, and this run is of "
                f"{checkpoint}. Give this checkpoint a folder of its own with --model_name."
            )


@lru_cache(maxsize=4096)  # the runs of a sweep check each other
def _recorded_checkpoint(folder: Path, changed_ns: int, nbytes: int) -> tuple[str | None, str | None]:
    """Return the fingerprint and location of the checkpoint that a run's record states; None where it states none.

    changed_ns, nbytes: when the record was written, and its size, since another process may write it again.
    """
    try:
        record = RunFolder(folder).read()
    except UsageError:  # its own command or the evaluation reports it
        return None, None
    return record.get("identity", {}).get("checkpoint"), checkpoint_of(record)


def checkpoint_of(record: dict[str, Any]) -> str | None:
    """Return the hub id or path of the checkpoint that a run's record states; None without one."""
    model = record.get("model", {})
    location: str | None = model.get("hub") or model.get("path")
    return location
