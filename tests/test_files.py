"""Files are replaced whole or not at all, and a lock is held by one process."""

import os
from pathlib import Path

import pytest

from sparsecache.errors import UsageError
from sparsecache.files import lock, locked, write_atomically


def test_writing_atomically_leaves_the_old_file_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_atomically(path, "old\n\x85é")
    assert path.read_bytes() == "old\n\x85é".encode()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UsageError, match=r"x\.json cannot be written: No space left on device"):
        write_atomically(path, "new")
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert path.read_bytes() == "old\n\x85é".encode()


def test_a_lock_is_held_by_one_and_waited_for(tmp_path: Path) -> None:
    release = lock(tmp_path / "lock", wait=False)
    assert release is not None
    assert lock(tmp_path / "lock", wait=False) is None
    release()
    with locked(tmp_path / "lock"):
        assert lock(tmp_path / "lock", wait=False) is None
    again = lock(tmp_path / "lock", wait=True)
    assert again is not None
    again()
