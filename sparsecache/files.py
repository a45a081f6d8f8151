"""Opens, locks and replaces files. `open_regular` opens files that users name or that runs wrote.

Every failure is a UsageError that names the file. Waits are reported on stderr.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path

from sparsecache.errors import UsageError

REPORT_AFTER_S = 1.0  # before a wait for a lock is reported
GIVE_UP_AFTER_S = 30.0  # a lock is held for milliseconds; a stopped process holds it forever
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def cache_folder() -> Path:
    """Returns the folder for files that can be made or downloaded again: $SPARSECACHE_CACHE, or the user's cache."""
    if own := os.environ.get("SPARSECACHE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsecache"


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Opens a regular file for reading, in binary mode. Never blocks.

    Symbolic links are followed. Raises UsageError, naming the file and the reason, for a file that is missing or may
    not be read, and for anything but a regular file (folder, named pipe, device, socket).
    """
    try:
        _check_regular(os.stat(path).st_mode, path)  # first: opening a device may act on it
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise UsageError(f"Could not read {_named(path)}: {reason(error)}.") from error
    try:
        _check_regular(os.fstat(descriptor).st_mode, path)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_file(path: str | os.PathLike[str], max_bytes: int | None = None) -> bytes:
    """Reads a whole regular file. Raises UsageError as `open_regular`, and for more than `max_bytes` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if max_bytes is not None and size > max_bytes:
            raise UsageError(f"{_named(path)} is too large: {size:,} bytes; at most {max_bytes:,} are read.")
        try:
            content = file.read() if max_bytes is None else file.read(max_bytes + 1)
        except OSError as error:
            raise UsageError(f"Could not read {_named(path)}: {reason(error)}.") from error
        except MemoryError as error:
            raise UsageError(f"{_named(path)} is too large for this machine's memory: {size:,} bytes.") from error
    if max_bytes is not None and len(content) > max_bytes:  # it grew, or its size is not known (/proc)
        raise UsageError(f"{_named(path)} is too large: at most {max_bytes:,} bytes are read.")
    return content


def lock(path: Path, wait: bool) -> Callable[[], None] | None:
    """Takes the lock file `path`; returns a function that releases it, or None if it is taken and `wait` is False.

    The kernel releases the lock when the process ends, also if it is killed. A wait is reported on stderr
    after REPORT_AFTER_S seconds and ends in a UsageError after GIVE_UP_AFTER_S. Raises UsageError for a file that
    cannot be opened or locked.
    """
    descriptor = _open_lock(path)
    try:
        taken = _take_lock(descriptor, path, wait)
    except BaseException:
        os.close(descriptor)
        raise
    if not taken:
        os.close(descriptor)
        return None
    return lambda: os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file `path`, waiting for it. Raises UsageError as `lock`."""
    release = lock(path, wait=True)
    assert release is not None
    try:
        yield
    finally:
        release()


def lock_holder(path: Path) -> str:
    """Returns who holds a lock file: "another process", with its id if it runs on this machine."""
    with contextlib.suppress(OSError):
        inode = str(os.stat(path).st_ino)
        with open("/proc/locks", encoding="ascii") as table:
            for line in table:
                fields = line.split()  # 1: FLOCK ADVISORY WRITE <pid> <major>:<minor>:<inode> 0 EOF
                if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode and fields[4] != "0":
                    return f"another process ({fields[4]})"
    return "another process"


def make_folder(path: Path, option: str = "", advice: str = "Name another one.") -> None:
    """Makes the folder of an option, with its parents. Raises UsageError if it cannot be made or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:
        named = f"{option} {_named(path)}".strip()
        raise UsageError(f"{named} cannot be written to ({reason(error)}). {advice}") from error


def list_folder(path: Path) -> list[Path]:
    """Returns the sorted entries of a folder. Raises UsageError for one that is missing or may not be read."""
    try:
        return [path / name for name in sorted(os.listdir(path))]
    except (OSError, ValueError) as error:
        raise UsageError(f"The folder {_named(path)} cannot be read: {reason(error)}.") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a regular file atomically: after a kill it has the old or the new content.

    Text is written as UTF-8; half a surrogate pair, which UTF-8 cannot hold, is written as its escape `\\udc80`
    (in JSON the same text). Raises UsageError, and keeps the old file, if the system refuses.
    """
    data = content if isinstance(content, bytes) else content.encode(errors="backslashreplace")
    temporary = path.parent / f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        if os.path.exists(path) and not os.path.isdir(path):  # the system itself refuses to replace a folder
            _check_regular(os.stat(path).st_mode, path, "written")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{_named(path)} cannot be written: {reason(error)}. The old file, if any, is unchanged. Free space or "
            f"change the permissions, then run the same command again."
        ) from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink()


def reason(error: BaseException) -> str:
    """Returns the reason of a system error, without its number and the file name."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def _check_regular(mode: int, path: str | os.PathLike[str], action: str = "read") -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
        raise UsageError(f"{_named(path)} cannot be {action}: it is {kind}, not a regular file.")


def _named(path: str | os.PathLike[str]) -> str:
    """Returns a path for a message; a very long one is shortened."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:150]}...{text[-100:]}"


def _open_lock(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"The lock file {_named(path)} cannot be opened: {reason(error)}. Delete it if no other process uses this "
            f"folder, or choose another folder."
        ) from error
    try:
        _check_regular(os.fstat(descriptor).st_mode, path, "locked")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _take_lock(descriptor: int, path: Path, wait: bool) -> bool:
    started, reported = time.monotonic(), False
    while not _try_lock(descriptor, path):
        if not wait:
            return False
        waited = time.monotonic() - started
        if waited > GIVE_UP_AFTER_S:
            raise UsageError(
                f"{_named(path)} has been locked by {lock_holder(path)} for {GIVE_UP_AFTER_S:.0f} seconds. End that "
                f"process if it hangs or is stopped, then run the same command again."
            )
        if waited > REPORT_AFTER_S and not reported:
            print(f"Waiting for {lock_holder(path)}, which has locked {_named(path)}.", file=sys.stderr, flush=True)
            reported = True
        time.sleep(min(0.05, 0.001 + waited / 10))
    return True


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UsageError(
            f"{_named(path)} cannot be locked: {reason(error)}. Choose a folder on a file system with locks."
        ) from error
    return True
