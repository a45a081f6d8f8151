"""Files that several processes use, and that a kill must not leave half written."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from sparsecache.errors import UsageError


def lock(path: Path, wait: bool) -> Callable[[], None] | None:
    """Takes the lock file `path`; returns what releases it, or None if it is taken and `wait` is False.

    The kernel drops the lock with the process, so a kill leaves nothing to clean up.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    return lambda: os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file `path`, waiting for it."""
    release = lock(path, wait=True)
    assert release is not None
    try:
        yield
    finally:
        release()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file so that a kill leaves the old one or the new one, never a part.

    Raises UsageError where the system does not let it, with the old file in place.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror}. Nothing in its place is changed; make room or give access, "
            f"and run the same command again."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # where there is no such folder, there is no such file
            temporary.unlink()
