"""Files are replaced whole or not at all, and a lock is held by one process."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsecache import files
from sparsecache.errors import UsageError
from sparsecache.files import lock, locked, open_regular, read_file, write_atomically


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


@pytest.fixture
def make_special(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a file that is not a regular one."""

    def make(kind: str) -> Path:
        path = tmp_path / kind
        if kind == "named pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(path))
        elif kind == "device":
            return Path("/dev/zero")
        elif kind == "link to a device":
            path.symlink_to("/dev/zero")
        elif kind == "link to itself":
            path.symlink_to(path)
        elif kind == "too long a name":
            return tmp_path / ("x" * 300)
        elif kind == "name with NUL":
            return tmp_path / "a\0b"
        return path

    return make


SPECIAL = [
    ("named pipe", "it is a named pipe, not a regular file"),
    ("folder", "it is a folder, not a regular file"),
    ("socket", "it is a socket, not a regular file"),
    ("device", "it is a device, not a regular file"),
    ("link to a device", "it is a device, not a regular file"),
    ("link to itself", "Too many levels of symbolic links"),
    ("too long a name", "File name too long"),
    ("name with NUL", "embedded null"),
    ("missing", "No such file or directory"),
]


@pytest.mark.parametrize(("kind", "why"), SPECIAL)
def test_only_regular_files_are_opened_and_nothing_blocks(kind: str, why: str, make_special) -> None:
    path = make_special(kind)
    for read in (open_regular, read_file):
        with pytest.raises(UsageError) as refused:
            read(path)
        assert why in str(refused.value) and str(path)[:100] in str(refused.value)


@pytest.mark.parametrize("kind", [kind for kind, _ in SPECIAL if kind not in ("missing", "link to itself")])
def test_special_files_are_not_replaced(kind: str, make_special) -> None:
    path = make_special(kind)
    with pytest.raises(UsageError, match="cannot be written"):
        write_atomically(path, "new")


def test_a_regular_file_is_read_through_links_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("a")
    assert read_file(tmp_path / "link") == read_file(tmp_path / "link", 5) == b"12345"
    with pytest.raises(UsageError, match="a is too large: 5 bytes; at most 4 are read"):
        read_file(tmp_path / "a", 4)
    os.truncate(tmp_path / "a", 2**40)  # a sparse file: its size is checked before it is read
    with pytest.raises(UsageError, match="too large"):
        read_file(tmp_path / "a", 2**20)
    with pytest.raises(UsageError, match="too large: at most 3 bytes"):
        read_file("/proc/self/status", 3)  # a file whose size the system gives as 0


def test_text_that_utf_8_cannot_hold_is_escaped(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.json", '"\ud83d é"')
    assert (tmp_path / "a.json").read_bytes() == '"\\ud83d é"'.encode()
    assert json.loads((tmp_path / "a.json").read_bytes()) == "\ud83d é"


def test_a_lock_file_that_cannot_be_opened_is_named(tmp_path: Path, make_special) -> None:
    for path in (tmp_path, make_special("named pipe"), make_special("link to itself"), tmp_path / "no" / "lock"):
        with pytest.raises(UsageError, match="lock file|cannot be locked"):
            lock(path, wait=False)


HOLD = """
import os, signal, sys
from pathlib import Path
from sparsecache.files import lock
release = lock(Path(sys.argv[1]), wait=True)
print("held", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_waiting_for_a_stopped_process_is_reported_and_ends(tmp_path: Path, repo: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "lock"
    environment = {**os.environ, "PYTHONPATH": str(repo)}
    monkeypatch.setattr(files, "REPORT_AFTER_S", 0.05)
    monkeypatch.setattr(files, "GIVE_UP_AFTER_S", 0.3)
    command = [sys.executable, "-c", HOLD, path]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"held\n"
            with pytest.raises(UsageError) as refused, locked(path):
                pass
        finally:
            process.kill()
    message = str(refused.value)
    assert f"{path} has been locked by another process" in message and str(process.pid) in message
    told = capsys.readouterr().err
    assert told == f"Waiting for another process ({process.pid}), which has locked {path}.\n"
    with locked(path):  # free once the process is gone
        pass
