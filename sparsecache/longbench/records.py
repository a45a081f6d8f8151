"""Prediction files and run.json on disk: appended row by row, repaired after a kill, never mixed up.

Layout: `pred/<model>/<name>/<dataset>.jsonl`, one flushed line per row, and `run.json` beside them.

In one file because both kinds of file share locking, appending and the check of identity.
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jsonlines

from sparsecache.errors import UsageError, listed, one_line
from sparsecache.files import lock, lock_holder, locked, make_folder, open_regular, write_atomically
from sparsecache.longbench.identity import identity_differences
from sparsecache.longbench.jsonl import dumps, read_json, read_objects, write_json
from sparsecache.longbench.prediction_row import as_longbench_row, check_row, is_finished
from sparsecache.longbench.run_record import BY_DATASET, RUN_FILE, RunRecord, parse_run_record
from sparsecache.longbench.schema import SchemaError

_OTHER_FOLDER = "Choose another --pred_dir or --name."
_RUN_ADVICE = "Correct it, or start the run afresh with --overwrite."
_ADVICE = (
    "Repair or delete that line, or give the run's own command again: it cuts off a last line that was left half "
    "written, and starts afresh with --overwrite."
)


class PredictionFile:
    """One dataset's prediction rows, open for appending by one process.

    Opening locks the dataset, cuts off a line that a kill left half written, and drops error rows, so that
    what remains are the finished rows (`done`) and what is missing can be appended. Raises UsageError when
    another process holds the dataset, or for a line that is broken otherwise or whose `_id` is repeated.
    """

    def __init__(self, path: Path):
        self.path = path
        make_folder(path.parent, advice=_OTHER_FOLDER)
        self._lock = lock(_lock_path(path), wait=False)
        if self._lock is None:
            raise UsageError(
                f"{path} is being written by {lock_holder(_lock_path(path))}. Wait for it, or choose other --datasets "
                f"or --name."
            )
        try:
            self.done = self._repair()
            self._file = _Appender(path)
        except BaseException:
            self._lock()
            raise
        self._writer = jsonlines.Writer(self._file, dumps=dumps)  # type: ignore[arg-type]  # all it needs is write

    def append(self, record: dict[str, Any]) -> None:
        """Writes one row, through to the system. Raises UsageError when the disk is full or a limit is met.

        A row that could not be written whole is cut off again, so that every earlier row stays as it was.
        """
        if not self._file.is_at(self.path):
            raise UsageError(
                f"{self.path} was deleted or replaced while this run wrote to it, so its rows would be lost. Run the "
                f"same command again (without --overwrite); finished rows in the present file are kept."
            )
        try:
            self._writer.write(record)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise UsageError(
                f"{self.path} cannot grow: {error.strerror}. Its {len(self.done)} finished rows are kept. "
                f"Free space or raise the limit, then rerun the command without --overwrite to resume."
            ) from error
        if is_finished(record):
            self.done.add(record["_id"])

    def close(self) -> None:
        """Closes the file, and releases the dataset to other processes."""
        self._file.close()
        if self._lock is not None:
            self._lock()
            self._lock = None

    def __enter__(self) -> "PredictionFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _repair(self) -> set[str]:
        if not os.path.lexists(self.path):
            return set()
        with open_regular(self.path) as file:
            size, whole = os.fstat(file.fileno()).st_size, _whole_lines(file)
        if whole < size:
            os.truncate(self.path, whole)
        rows = list(read_rows(self.path))
        _check_ids(self.path, [row for row in rows if "error" not in row])
        finished = [row for row in rows if is_finished(row)]
        if len(finished) < len(rows):
            write_atomically(self.path, "".join(dumps(row) + "\n" for row in finished))
        return {row["_id"] for row in finished}


def _whole_lines(file: BinaryIO) -> int:
    """The bytes of a file up to its last line end, found from the end so that a large file is not read whole."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 2**16)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


def _check_ids(path: Path, rows: list[dict[str, Any]]) -> None:
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        row_id = row.get("_id")
        problem = "has no _id" if not isinstance(row_id, str) else "repeats an _id" if row_id in seen else None
        if problem:
            raise UsageError(f"{path}: row {number} {problem}, so the file is not this program's. {_ADVICE}")
        seen.add(str(row_id))


class _Appender:
    """The end of a file: each line goes through to the system whole, or leaves no trace and raises OSError."""

    def __init__(self, path: Path):
        self._line = ""
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, text: str) -> None:
        self._line += text
        if not text.endswith("\n"):
            return
        left, self._line = memoryview(self._line.encode()), ""
        end = os.fstat(self._descriptor).st_size
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            os.ftruncate(self._descriptor, end)
            raise

    def is_at(self, path: Path) -> bool:
        """Whether the open file is still the one of this path."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(path))
        except OSError:
            return False

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_rows(path: Path, needed: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Yields the rows of a prediction file, checked (see prediction_row).

    Rows that LongBench v2's own code wrote are converted.

    Raises UsageError, naming the line, for one that is not a JSON object, has a field of a wrong type or size, or
    lacks a `needed` one.
    """
    with open_regular(path) as lines:
        for number, row in read_objects(lines, str(path), _ADVICE):
            row = as_longbench_row(row)
            try:
                check_row(row, needed)
            except SchemaError as error:
                raise UsageError(f"{path}, line {number}: {error}. {_ADVICE}") from error
            yield row


def verify_rows(path: Path, wanted: Iterable[str]) -> list[dict[str, Any]]:
    """Reads a prediction file back and returns its rows, after a run that wrote every `wanted` one.

    Raises UsageError, naming the rows, where a wanted one is neither finished nor an error row: the file was replaced
    or changed while the run wrote to it.
    """
    rows = list(read_rows(path)) if os.path.lexists(path) else []
    present = {row.get("_id") for row in rows if "error" in row or is_finished(row)}
    if lost := [row_id for row_id in wanted if row_id not in present]:
        raise UsageError(
            f"{path} lacks {len(lost)} rows that this run wrote ({listed(lost, 5)}): the file was replaced or changed "
            f"meanwhile. Run the same command again (without --overwrite) to predict them."
        )
    return rows


class RunFolder:
    """The folder of one run and its record, `run.json`, which several processes may fill together."""

    def __init__(self, path: Path):
        self.path = path

    def predictions(self, stem: str) -> Path:
        """Path of one dataset's prediction file."""
        return self.path / f"{stem}.jsonl"

    def make(self) -> None:
        """Makes the folder. Raises UsageError where it cannot be made or written to."""
        make_folder(self.path, advice=_OTHER_FOLDER)

    def read(self) -> dict[str, Any]:
        """Returns the checked content of run.json, or an empty table. Raises UsageError for a wrong field in it."""
        return self.load().json

    def load(self) -> RunRecord:
        """Returns run.json as a typed object, an empty one without the file. Raises UsageError for a wrong field."""
        path = self.path / RUN_FILE
        if not os.path.lexists(path):
            return RunRecord()
        try:
            return parse_run_record(read_json(path))
        except SchemaError as error:
            raise UsageError(f"{path}: {error}. {_RUN_ADVICE}") from error
        except ValueError as error:
            raise UsageError(f"{path} is not valid JSON ({one_line(error)}). {_RUN_ADVICE}") from error

    def update(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Applies `change` to the record and writes it, atomically and alone."""
        make_folder(self.path, advice=_OTHER_FOLDER)
        with locked(self.path / ".run.lock"):
            record = self.read()
            change(record)
            write_json(self.path / RUN_FILE, record)

    def check(self, identity: dict[str, Any]) -> None:
        """Raises UsageError if the folder belongs to another run than `identity`, or may do. Writes nothing.

        Tables by dataset (templates, protocol, data) are compared where both have the dataset.
        """
        self._check(self.read(), _as_json(identity))

    def claim(self, identity: dict[str, Any]) -> None:
        """Records `identity` in run.json. Raises UsageError as `check`.

        Tables by dataset are merged, so that one run may be filled dataset by dataset. An infinite number is
        recorded as text, since JSON has none.
        """
        identity = _as_json(identity)

        def change(record: dict[str, Any]) -> None:
            self._check(record, identity)
            record["identity"] = _merged(record.get("identity", {}), identity)

        self.update(change)

    def _check(self, record: dict[str, Any], identity: dict[str, Any]) -> None:
        known = record.get("identity", {})
        recorded = known.get("data", {})
        unknown = [
            stem for stem in identity.get("data", ()) if stem not in recorded and self.predictions(stem).exists()
        ]
        if unknown:
            raise UsageError(
                f"{self.path} holds predictions of {', '.join(unknown)} but no {RUN_FILE} that says how they were "
                f"made. Choose another --name, or start this one afresh with --overwrite."
            )
        if known and (differing := list(identity_differences(known, identity))):
            raise UsageError(
                f"{self.path} holds a run with other settings: {'; '.join(differing)}. Choose another --name, "
                f"start this one afresh with --overwrite, or delete the folder."
            )

    def clear(self, stems: list[str]) -> None:
        """Deletes the run's record, results and the prediction files named.

        Raises UsageError, and deletes nothing, if another process holds one of them.
        """
        with contextlib.ExitStack() as locks:
            paths = [path for path in map(self.predictions, stems) if path.exists() or _lock_path(path).exists()]
            for path in paths:
                locks.enter_context(contextlib.closing(_DatasetLock(path)))
            for path in paths:
                path.unlink(missing_ok=True)
        for name in (RUN_FILE, "result.json", "summary.json", "result.txt", "result_e.json", "summary_e.json"):
            (self.path / name).unlink(missing_ok=True)


class _DatasetLock:
    """The lock of a dataset whose files are being deleted. Raises UsageError if another process has it."""

    def __init__(self, path: Path):
        self._release = lock(_lock_path(path), wait=False)
        if self._release is None:
            raise UsageError(
                f"{path} is being written by {lock_holder(_lock_path(path))}, so --overwrite cannot delete it."
            )

    def close(self) -> None:
        if self._release is not None:
            self._release()


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.stem}.lock")


def _as_json(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity as it is read back from run.json; an infinite number becomes a text."""
    found: dict[str, Any] = json.loads(json.dumps(identity), parse_constant=lambda name: str(float(name)))
    return found


def _merged(known: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    tables = {key: {**known.get(key, {}), **wanted[key]} for key in BY_DATASET if key in wanted}
    return {**known, **wanted, **tables}
