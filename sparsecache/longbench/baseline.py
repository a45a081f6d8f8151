"""What a gate compares: a run boiled down to scores by row and to what it was made of; small enough to be committed."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from sparsecache.errors import UsageError, one_line, short
from sparsecache.longbench.jsonl import read_json, write_json
from sparsecache.longbench.report import decode_speed
from sparsecache.longbench.run_record import check_identity
from sparsecache.longbench.schema import Amount, Count, Number, Range, SchemaError, parse
from sparsecache.longbench.scores import DatasetScore, Options, RunScore
from sparsecache.longbench.sessions import batch_sizes, devices

VERSION = 1
Percent = Annotated[float, Range(0, 100)]
Share = Annotated[float, Range(0, 1)]
_PROMPT_DIGITS = 16  # of its SHA-256: enough to tell prompts apart by accident, not by malice


@dataclass(frozen=True)
class BaselineDataset:
    """One dataset: its metric, its official score, what was kept, and by `_id` each row's score and prompt's hash."""

    metric: str
    score: Percent | None
    kept: Number | None
    scores: dict[str, Share]
    prompts: dict[str, str]


@dataclass(frozen=True)
class Baseline:
    """A run for a gate.

    unfinished: what is missing of it, dataset by dataset. scoring: the scorer's choices. identity: that of run.json,
    empty for a folder from elsewhere. tokens_per_s: decode speed over all rows, with the devices and batch sizes that
    it was measured on. datasets: by file stem.
    """

    name: str
    e: bool
    unfinished: list[str]
    scoring: dict[str, Any]
    identity: dict[str, Any]
    tokens_per_s: Amount | None
    devices: list[str]
    batch_sizes: list[Count]
    datasets: dict[str, BaselineDataset]

    @property
    def kept(self) -> float | None:
        """The share of past tokens attended to: the mean over the datasets that report one."""
        shares = [dataset.kept for dataset in self.datasets.values() if dataset.kept is not None]
        return sum(shares) / len(shares) if shares else None

    @property
    def method(self) -> str:
        """The method's name, as far as it is known."""
        return str(self.identity.get("method", "unknown method"))

    def save(self, path: Path) -> None:
        """Writes the file. Raises UsageError where it cannot, or where something other than a baseline lies there."""
        if path.exists():
            load_baseline(path)
        record = {"sparsecache_baseline": VERSION, **asdict(self)}
        write_json(path, record)


def baseline_of(run: RunScore, options: Options) -> Baseline:
    """The run as a baseline. Raises UsageError if rows have no `_id` or share one, so that they cannot be matched."""
    speed = decode_speed(run.run) or {}
    return Baseline(
        name=str(run.folder),
        e=run.e,
        unfinished=[
            f"{dataset.task.file_stem(run.e)} {dataset.finished} of {dataset.asked} rows{_failed(dataset)}"
            for dataset in run.datasets
            if not dataset.complete
        ],
        scoring={"edit_backend": options.edit_backend, "official_recursion": options.official_recursion},
        identity=run.run.json.get("identity", {}),
        tokens_per_s=speed.get("tokens_per_s"),
        devices=devices(run.run),
        batch_sizes=batch_sizes(run.run),
        datasets={dataset.task.file_stem(run.e): _dataset(dataset, run.folder) for dataset in run.datasets},
    )


def load_baseline(path: Path) -> Baseline:
    """Reads a saved baseline. Raises UsageError for a file that is none."""
    try:
        baseline = _parse(read_json(path))
    except SchemaError as error:
        problem = str(error)
    except ValueError as error:
        problem = f"it is not readable as JSON ({one_line(error)})"
    else:
        return replace(baseline, name=str(path))
    raise UsageError(f"{path} is no baseline: {problem}. Save one with --save_baseline, under a free name.")


def _parse(record: Any) -> Baseline:
    if not isinstance(record, dict) or "sparsecache_baseline" not in record:
        raise SchemaError("it is JSON of another kind")
    version = record["sparsecache_baseline"]
    if version != VERSION or isinstance(version, bool):
        raise SchemaError(f"it has version {short(version)} of the format, not {VERSION}")
    baseline = parse(Baseline, record)
    check_identity(baseline.identity)
    return baseline


def _failed(dataset: DatasetScore) -> str:
    failed = dataset.count("error_row")
    return f", {failed} failed" if failed else ""


def _dataset(dataset: DatasetScore, folder: Path) -> BaselineDataset:
    ids = [str(record["_id"]) for record in dataset.records if record.get("_id") is not None]
    if len(set(ids)) < len(dataset.records):
        raise UsageError(
            f"{dataset.task.name} of {folder} has rows without an `_id` or with the same one, so they cannot be "
            f"matched with another run's. Predict them again."
        )
    return BaselineDataset(
        metric=dataset.task.metric,
        score=dataset.summary.score,
        kept=dataset.kept.share if dataset.kept else None,
        scores=dict(zip(ids, (row.score for row in dataset.rows), strict=True)),
        prompts={
            row_id: prompt
            for row_id, record in zip(ids, dataset.records, strict=True)
            if (prompt := _prompt(record)) is not None
        },
    )


def _prompt(record: dict[str, Any]) -> str | None:
    """What tells a row's prompt from others: digits of the hash of its text, and of that of its ids if there is one."""
    hashes = [record.get("prompt_sha256"), record.get("prompt_ids_sha256")]
    known = [found[:_PROMPT_DIGITS] for found in hashes if isinstance(found, str)]
    return ":".join(known) if isinstance(hashes[0], str) else None


def same_prompt(mine: str, theirs: str) -> bool:
    """Whether two entries of `prompts` are of the same prompt: by its token ids where both know them, else its text."""
    (my_text, _, my_ids), (their_text, _, their_ids) = mine.partition(":"), theirs.partition(":")
    return my_ids == their_ids if my_ids and their_ids else my_text == their_text
