"""Reads and checks rows from the Hugging Face hub, a folder, a zip, or the bundled sample."""

import hashlib
import io
import json
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset, Features, List, Value
from datasets.table import InMemoryTable

from sparsecache.errors import UsageError, one_line
from sparsecache.files import open_regular, read_file
from sparsecache.longbench.jsonl import read_objects
from sparsecache.longbench.tasks import Task

HUB_REPO = "THUDM/LongBench"
HUB_FILE = "data.zip"

_FEATURES = Features(
    {
        "input": Value("string"),
        "context": Value("large_string"),
        "answers": List(Value("string")),
        "length": Value("int64"),
        "dataset": Value("string"),
        "language": Value("string"),
        "all_classes": List(Value("string")),
        "_id": Value("string"),
    }
)
_TYPES: dict[str, type] = {"input": str, "context": str, "length": int, "dataset": str, "language": str, "_id": str}
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


@dataclass(frozen=True)
class Rows:
    """The rows of one dataset and the SHA-256 of the bytes they were read from."""

    dataset: Dataset
    sha256: str


def load_rows(source: Source, task: Task, e: bool = False) -> Rows:
    """Read and check every row of one dataset.

    Raises UsageError with file and line for invalid JSON, a missing key, a value of a wrong type, a row of another
    dataset, a repeated `_id`, and for a row count other than the published one.
    """
    name, content = source.read(task, e)
    rows: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for number, row in read_objects(io.BytesIO(content), name, _ADVICE):
        problem = _find_problem(row, task.file_stem(e)) or _find_repeat(row["_id"], seen)
        if problem:
            raise UsageError(f"{name}, line {number}: {problem} {_ADVICE}")
        seen[row["_id"]] = number
        rows.append({key: row[key] for key in _FEATURES})
    expected = task.published_rows(e)
    if source.published and expected is not None and len(rows) != expected:
        raise UsageError(f"{name} holds {len(rows)} rows; the published dataset has {expected}. {_ADVICE}")
    if not rows:
        raise UsageError(f"{name} holds no rows. {_ADVICE}")
    digest = hashlib.sha256(content).hexdigest()
    table = InMemoryTable.from_pylist(rows, schema=_FEATURES.arrow_schema)
    return Rows(Dataset(table, fingerprint=digest), digest)  # Dataset.from_list would compute a fingerprint by pickling


def open_source(data: str, *, sample: Source, revision: str | None = None, offline: bool = False) -> Source:
    """Return the source of a `--data` value: `hub`, `sample`, a folder or a zip.

    `sample`: the source to return for `sample`. Only `hub` uses the network, and not with `offline`. Raises UsageError
    for any other value.
    """
    if revision is not None and data != "hub":
        raise UsageError(f"--data_revision {revision} applies to --data hub only, not to --data {data}. Omit it.")
    if data == "hub":
        return ZipSource(*_get_from_hub(revision, offline))
    if data == "sample":
        return sample
    path = Path(data)
    if data and os.path.isdir(path):
        return FolderSource(path)
    if data and os.path.exists(path):
        with open_regular(path) as file:
            if zipfile.is_zipfile(file):
                return ZipSource(path)
    raise UsageError(
        f"--data {data!r} is neither a folder nor a zip file. Allowed: hub, sample, a folder of <dataset>.jsonl "
        f"files, or a zip of them."
    )


@dataclass(frozen=True)
class FolderSource:
    """A folder of `<dataset>.jsonl` files."""

    folder: Path
    published: bool = False

    def read(self, task: Task, e: bool) -> tuple[str, bytes]:
        path = self.folder / f"{task.file_stem(e)}.jsonl"
        if not os.path.lexists(path):
            found = sorted(file.stem for file in self.folder.glob("*.jsonl"))
            raise UsageError(
                f"{path} does not exist. {self.folder} holds: {', '.join(found) or 'no .jsonl file'}. Choose among "
                f"these with --datasets."
            )
        return str(path), read_file(path, MAX_BYTES)

    def describe(self) -> dict[str, Any]:
        return {"source": "folder", "path": str(self.folder)}


@dataclass(frozen=True)
class ZipSource:
    """A zip with `<dataset>.jsonl` members in any folder.

    `hub`: the repository and commit of the hub's `data.zip`.
    """

    path: Path
    hub: dict[str, Any] | None = None

    @property
    def published(self) -> bool:
        return self.hub is not None

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
        return {"source": "hub" if self.hub else "zip", "path": str(self.path), "sha256": digest, **(self.hub or {})}


def _get_from_hub(revision: str | None, offline: bool) -> tuple[Path, dict[str, Any]]:
    """Return the path of data.zip in the hub's cache, and its repository, revision and commit."""
    path = _find_cached(revision) if offline else _download(revision)
    commit = path.parent.name  # .../snapshots/<commit>/data.zip
    return path, {"repo": HUB_REPO, "revision": revision, "commit": commit}


def _find_cached(revision: str | None) -> Path:
    # hf_hub_download may use the network even with local_files_only.
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(HUB_REPO, HUB_FILE, repo_type="dataset", revision=revision)
    if not isinstance(found, str):
        raise UsageError(
            f"{HUB_FILE} of {HUB_REPO} at revision {revision or 'main'} is not in the hub's cache, and --offline "
            f"forbids the download. Run once without --offline, or name a folder or zip with --data."
        )
    return Path(found)


def _download(revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(HUB_REPO, HUB_FILE, repo_type="dataset", revision=revision))
    except Exception as error:  # the client raises many types (network, status, cache)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"Could not download {HUB_FILE} of {HUB_REPO} ({reason}). Check the network and --data_revision, or name a "
            f"folder or zip with --data."
        ) from error


def _find_problem(row: dict[str, Any], dataset: str) -> str | None:
    missing = [key for key in _FEATURES if key not in row]
    if missing:
        return f"the row lacks {', '.join(missing)}."
    for key, kind in _TYPES.items():
        if not isinstance(row[key], kind) or isinstance(row[key], bool):
            return f"{key} is {json.dumps(row[key])[:40]}, not of type {kind.__name__}."
    if row["length"].bit_length() > 63:
        return "length does not fit into 64 bits."
    if not _strings(row["answers"]) or not row["answers"]:
        return "answers is not a list of at least one string."
    if row["all_classes"] is not None and not _strings(row["all_classes"]):
        return "all_classes is neither null nor a list of strings."
    if not _encodable(row):
        return "a string holds a lone surrogate."
    if row["dataset"] != dataset:
        return f"the row belongs to dataset {row['dataset']!r}, not {dataset!r}."
    return None


def _find_repeat(row_id: str, seen: dict[str, int]) -> str | None:
    return f"_id {row_id!r} is already in line {seen[row_id]}." if row_id in seen else None


def _encodable(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
