"""Reads and checks rows from the Hugging Face hub, a folder, a file or a zip."""

import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset
from datasets.table import InMemoryTable

from sparsecache.errors import UsageError, one_line
from sparsecache.files import open_regular, read_file
from sparsecache.longbench.jsonl import loads, read_objects
from sparsecache.longbench.source_rows import RowChecker
from sparsecache.longbench.tasks import OWN, Task

HUB_FILES = {"longbench": ("THUDM/LongBench", "data.zip"), "longbench_v2": ("THUDM/LongBench-v2", "data.json")}
"""The repository and file of each benchmark on the hub."""

MAX_BYTES = 2**30  # per dataset; its rows take several times as much memory
# RuntimeError: an encrypted member; NotImplementedError: an unknown method; ValueError, OverflowError: broken sizes.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, OverflowError)
_ADVICE = "Invalid rows are never skipped. Fetch or write the complete file again."


class Source(Protocol):
    """A source of datasets as JSON Lines."""

    def read(self, task: Task, e: bool) -> tuple[str, bytes]:
        """Return a name for messages and the bytes of one dataset.

        Raises UsageError if it is missing.
        """

    def describe(self) -> dict[str, Any]:
        """Return the entry of this source in run.json."""

    @property
    def published(self) -> bool:
        """Whether row counts must equal the published ones."""

    @property
    def fills_rows(self) -> bool:
        """Whether rows may lack all fields but `input`, `context` and `answers`."""


@dataclass(frozen=True)
class Rows:
    """The rows of one dataset and the SHA-256 of the bytes they were read from."""

    dataset: Dataset
    sha256: str

    @cached_property
    def ids(self) -> list[str]:
        """The `_id` of every row."""
        return list(self.dataset["_id"])


def load_rows(source: Source, task: Task, e: bool = False) -> Rows:
    """Read and check every row of one dataset.

    Raises UsageError with file and line for invalid JSON, a missing key, a value of a wrong type, a row of another
    dataset, a repeated `_id`, and for a row count other than the published one.
    """
    name, content = source.read(task, e)
    checker = RowChecker(task, e, fill=source.fills_rows or task.group == OWN)
    rows: list[dict[str, Any]] = []
    for place, record in _read_records(content, name):
        row, problem = checker.check(record, place)
        if problem:
            raise UsageError(f"{name}, {place}: {problem} {_ADVICE}")
        rows.append(row)
    expected = task.published_rows(e)
    if source.published and expected is not None and len(rows) != expected:
        raise UsageError(f"{name} holds {len(rows)} rows; the published dataset has {expected}. {_ADVICE}")
    if not rows:
        raise UsageError(f"{name} holds no rows. {_ADVICE}")
    digest = hashlib.sha256(content).hexdigest()
    table = InMemoryTable.from_pylist(rows, schema=checker.features.arrow_schema)
    return Rows(Dataset(table, fingerprint=digest), digest)  # Dataset.from_list would compute a fingerprint by pickling


def _read_records(content: bytes, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of JSON Lines, or of one JSON array, with their places in the file."""
    if content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"[":
        for number, record in read_objects(io.BytesIO(content), name, _ADVICE):
            yield f"line {number}", record
        return
    try:
        records = loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is not valid JSON ({one_line(error)}). {_ADVICE}") from error
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UsageError(f"{name}, row {number}: the row is not a JSON object. {_ADVICE}")
        yield f"row {number}", record


def open_source(
    data: str,
    *,
    sample: Source,
    revision: str | None = None,
    offline: bool = False,
    benchmarks: Collection[str] = ("longbench",),
) -> Source:
    """Return the source of a `--data` value: `hub`, `sample`, a folder, a zip, a .jsonl or a .json file.

    `sample`: the source to return for `sample`. Only `hub` uses the network, and not with `offline`; it fetches the
    files of `benchmarks`. Raises UsageError for any other value.
    """
    if revision is not None and data != "hub":
        raise UsageError(f"--data_revision {revision} applies to --data hub only, not to --data {data}. Omit it.")
    if data == "hub":
        if revision is not None and len(benchmarks) > 1:
            raise UsageError(
                f"--data_revision {revision} would apply to {len(benchmarks)} repositories of the hub. Predict "
                f"LongBench and LongBench v2 separately."
            )
        return HubSource({name: _get_from_hub(name, revision, offline) for name in benchmarks})
    if data == "sample":
        return sample
    path = Path(data)
    if data and os.path.isdir(path):
        return FolderSource(path)
    if data and os.path.exists(path):
        with open_regular(path) as file:
            if zipfile.is_zipfile(file):
                return ZipSource(path)
        if path.suffix in (".jsonl", ".json"):
            return FileSource(path)
    what = "is neither a folder nor a zip file, nor a .jsonl file" if os.path.exists(path) else "does not exist"
    raise UsageError(
        f"--data {data!r} {what}. Allowed: hub, sample, a folder of <dataset>.jsonl files, a zip of them, or one "
        f".jsonl (or .json) file of rows."
    )


@dataclass(frozen=True)
class FolderSource:
    """A folder of `<dataset>.jsonl` files."""

    folder: Path
    published: bool = False
    fills_rows: bool = False

    def read(self, task: Task, e: bool) -> tuple[str, bytes]:
        path = self.folder / f"{task.file_stem(e)}.jsonl"
        if task.benchmark == "longbench_v2":
            others = (self.folder / name for name in ("longbench_v2.jsonl", HUB_FILES["longbench_v2"][1]))
            path = next((found for found in (path, *others) if os.path.lexists(found)), path)
        if not os.path.lexists(path):
            found = sorted(file.stem for file in self.folder.glob("*.jsonl"))
            if not found:
                raise UsageError(
                    f"{self.folder} holds no .jsonl file. --data takes a folder of <dataset>.jsonl files "
                    f"(docs/data.md)."
                )
            raise UsageError(
                f"{path} does not exist. {self.folder} holds: {', '.join(found)}. Choose among these with --datasets."
            )
        return str(path), read_file(path, MAX_BYTES)

    def describe(self) -> dict[str, Any]:
        return {"source": "folder", "path": str(self.folder)}


@dataclass(frozen=True)
class FileSource:
    """One file of rows, as JSON Lines or a JSON array, for every dataset that is asked for."""

    path: Path
    published: bool = False
    fills_rows: bool = True

    def read(self, task: Task, e: bool) -> tuple[str, bytes]:
        return str(self.path), read_file(self.path, MAX_BYTES)

    def describe(self) -> dict[str, Any]:
        return {"source": "file", "path": str(self.path)}


@dataclass(frozen=True)
class HubSource:
    """The files of one or more benchmarks in the hub's cache.

    `files`: by benchmark, the path and the repository, revision and commit.
    """

    files: dict[str, tuple[Path, dict[str, Any]]]
    published: bool = True
    fills_rows: bool = False

    def read(self, task: Task, e: bool) -> tuple[str, bytes]:
        return self._source(task.benchmark).read(task, e)

    def describe(self) -> dict[str, Any]:
        parts = {name: self._describe(name) for name in self.files}
        return next(iter(parts.values())) if len(parts) == 1 else {"source": "hub", **parts}

    def _source(self, benchmark: str) -> "FileSource | ZipSource":
        path = self.files[benchmark][0]
        return FileSource(path) if path.suffix == ".json" else ZipSource(path)

    def _describe(self, benchmark: str) -> dict[str, Any]:
        path, origin = self.files[benchmark]
        with open_regular(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"source": "hub", "path": str(path), "sha256": digest, **origin}


@dataclass(frozen=True)
class ZipSource:
    """A zip with `<dataset>.jsonl` members in any folder."""

    path: Path
    published: bool = False
    fills_rows: bool = False

    def read(self, task: Task, e: bool) -> tuple[str, bytes]:
        wanted = f"{task.file_stem(e)}.jsonl"
        try:
            with open_regular(self.path) as file, zipfile.ZipFile(file) as archive:
                return self._read_member(archive, wanted)
        except _ZIP_ERRORS as error:
            raise UsageError(
                f"{self.path} is not a readable zip ({one_line(error)}). Delete it and download it again."
            ) from error

    def _read_member(self, archive: zipfile.ZipFile, wanted: str) -> tuple[str, bytes]:
        members = [
            member
            for member in archive.infolist()
            if Path(member.filename).name == wanted and not member.filename.startswith("__MACOSX/")
        ]
        if len(members) != 1:
            raise UsageError(f"{self.path} holds {len(members)} members named {wanted}; it must hold exactly one.")
        (member,) = members
        name = f"{self.path}:{member.filename}"
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UsageError(f"{name} is not compressed with deflate. Create the zip again with deflate.")
        if member.file_size > MAX_BYTES:
            raise UsageError(
                f"{name} is too large: {member.file_size:,} bytes uncompressed; at most {MAX_BYTES:,} are read."
            )
        return name, archive.read(member)

    def describe(self) -> dict[str, Any]:
        with open_regular(self.path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"source": "zip", "path": str(self.path), "sha256": digest}


def _get_from_hub(benchmark: str, revision: str | None, offline: bool) -> tuple[Path, dict[str, Any]]:
    """Return the path of a benchmark's file in the hub's cache, and its repository, revision and commit."""
    repo, file = HUB_FILES[benchmark]
    path = _find_cached(repo, file, revision) if offline else _download(repo, file, revision)
    commit = path.parent.name  # .../snapshots/<commit>/<file>
    return path, {"repo": repo, "revision": revision, "commit": commit}


def _find_cached(repo: str, file: str, revision: str | None) -> Path:
    # hf_hub_download may use the network even with local_files_only.
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file, repo_type="dataset", revision=revision)
    if not isinstance(found, str):
        raise UsageError(
            f"{file} of {repo} at revision {revision or 'main'} is not in the hub's cache, and --offline "
            f"forbids the download. Run once without --offline, or name a folder or zip with --data."
        )
    return Path(found)


def _download(repo: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset", revision=revision))
    except Exception as error:  # the client raises many types (network, status, cache)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"Could not download {file} of {repo} ({reason}). Check the network and --data_revision, or name a "
            f"folder or zip with --data."
        ) from error
