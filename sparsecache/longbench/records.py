"""Prediction files and run.json on disk: appended row by row, repaired after a kill, never mixed up.

Layout: `pred/<model>/<name>/<dataset>.jsonl`, one flushed line per row, and `run.json` beside them.
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jsonlines

from sparsecache.errors import UsageError, one_line
from sparsecache.files import lock, lock_holder, locked, make_folder, open_regular, write_atomically
from sparsecache.longbench.jsonl import dumps, read_json, read_objects, write_json

RUN_FILE = "run.json"
BY_DATASET = ("templates", "protocol", "data")  # the tables of an identity that have an entry per dataset
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
        try:
            self._writer.write(record)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise UsageError(
                f"{self.path} cannot grow: {error.strerror}. Its {len(self.done)} finished rows are safe; make "
                f"room and run the same command again (without --overwrite), it goes on from there."
            ) from error
        if "error" not in record:
            self.done.add(record["_id"])

    def close(self) -> None:
        """Closes the file and lets other processes at the dataset."""
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
        finished = [row for row in rows if "error" not in row]
        if len(finished) < len(rows):
            write_atomically(self.path, "".join(dumps(row) + "\n" for row in finished))
        done: set[str] = set()
        for number, row in enumerate(finished, 1):
            problem = _row_problem(row, done)
            if problem:
                raise UsageError(f"{self.path}: row {number} {problem}, so the file is not this program's. {_ADVICE}")
            done.add(row["_id"])
        return done


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


def _row_problem(row: dict[str, Any], done: set[str]) -> str | None:
    if not isinstance(row.get("_id"), str):
        return "has no _id"
    return "repeats an _id" if row["_id"] in done else None


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

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a prediction file. Raises UsageError, naming the line, for one that is not a JSON object."""
    with open_regular(path) as lines:
        for _, row in read_objects(lines, str(path), _ADVICE):
            yield row


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
        """The record, or an empty one. Raises UsageError if run.json is not JSON."""
        path = self.path / RUN_FILE
        if not os.path.lexists(path):
            return {}
        try:
            record = read_json(path)
        except ValueError as error:
            raise UsageError(f"{path} is not valid JSON ({one_line(error)}). {_RUN_ADVICE}") from error
        if problem := _run_problem(record):
            raise UsageError(f"{path} {problem}. {_RUN_ADVICE}")
        return dict(record)

    def update(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Applies `change` to the record and writes it, atomically and alone."""
        make_folder(self.path, advice=_OTHER_FOLDER)
        with locked(self.path / ".run.lock"):
            record = self.read()
            change(record)
            write_json(self.path / RUN_FILE, record)

    def claim(self, identity: dict[str, Any]) -> None:
        """Makes this folder the one of `identity`. Raises UsageError when it belongs to another, or may do.

        Values that are tables (data and template hashes by dataset) are compared where both have the key, and
        merged, so that one run may be filled dataset by dataset. An infinite number is recorded as text, since JSON
        has none.
        """
        identity = json.loads(json.dumps(identity), parse_constant=lambda name: str(float(name)))

        def change(record: dict[str, Any]) -> None:
            known = record.get("identity", {})
            said = known.get("data", {})
            unknown = [
                stem for stem in identity.get("data", ()) if stem not in said and self.predictions(stem).exists()
            ]
            if unknown:
                raise UsageError(
                    f"{self.path} holds predictions of {', '.join(unknown)} but no {RUN_FILE} that says how they were "
                    f"made. Choose another --name, or start this one afresh with --overwrite."
                )
            differing = list(_differences(known, identity))
            if differing:
                raise UsageError(
                    f"{self.path} holds a run with other settings: {'; '.join(differing)}. Choose another --name, "
                    f"or start this one afresh with --overwrite."
                )
            record["identity"] = _merged(known, identity)

        self.update(change)

    def clear(self, stems: list[str]) -> None:
        """Deletes the run's record, results and the prediction files named.

        Raises UsageError, and deletes nothing, if another process holds one of them.
        """
        with contextlib.ExitStack() as held:
            paths = [path for path in map(self.predictions, stems) if path.exists() or _lock_path(path).exists()]
            for path in paths:
                held.enter_context(contextlib.closing(_Held(path)))
            for path in paths:
                path.unlink(missing_ok=True)
        for name in (RUN_FILE, "result.json", "summary.json", "result_e.json", "summary_e.json"):
            (self.path / name).unlink(missing_ok=True)


def _run_problem(record: Any) -> str | None:
    """What of a run's record was changed by hand so that it cannot be used."""
    if not isinstance(record, dict):
        return "is not a JSON object"
    places = [(key,) for key in ("identity", "model", "datasets")] + [("identity", key) for key in BY_DATASET]
    for place in places:
        table: Any = record
        for key in place:
            table = table.get(key, {})
        if not isinstance(table, dict):
            return f"holds something other than a table as {'.'.join(place)}"
    for stem, asked in record.get("datasets", {}).items():
        rows = asked.get("expected_rows") if isinstance(asked, dict) else None
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 0:
            return f"holds no number of rows as datasets.{stem}.expected_rows"
    sessions = record.get("sessions", [])
    if not isinstance(sessions, list) or not all(isinstance(one, dict) for one in sessions):
        return "holds something other than a list of tables as sessions"
    for clock in (one.get("clock") for one in sessions):
        if clock is not None and not (isinstance(clock, dict) and all(map(_is_figure, clock.values()))):
            return "holds a session whose clock is no table of figures"
    return None


def _is_figure(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


class _Held:
    """A dataset held just long enough to delete files."""

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


def _differences(known: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    for key in wanted if known else ():
        if key not in known:  # made by an earlier version, whose rows may be made otherwise
            yield f"{key} was not recorded"
            continue
        old, new = known[key], wanted[key]
        if key in BY_DATASET:
            yield from (
                f"{key} of {stem} was {old[stem]}, now {new[stem]}"
                for stem in sorted(old.keys() & new.keys())
                if old[stem] != new[stem]
            )
        elif old != new:
            yield f"{key} was {json.dumps(old, ensure_ascii=False)}, now {json.dumps(new, ensure_ascii=False)}"


def _merged(known: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    tables = {key: {**known.get(key, {}), **wanted[key]} for key in BY_DATASET if key in wanted}
    return {**known, **wanted, **tables}
