"""Baselines: the row scores and the identity of a run, in a file small enough to commit."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from sparsecache.errors import UsageError, one_line, short
from sparsecache.longbench.jsonl import read_json, write_json
from sparsecache.longbench.report import decode_speed
from sparsecache.longbench.row_ids import has_no_ids, line_keys
from sparsecache.longbench.run_record import check_identity
from sparsecache.longbench.schema import Amount, Count, Number, Range, SchemaError, parse
from sparsecache.longbench.score_types import DatasetScore, RunScore
from sparsecache.longbench.scores import ScoringOptions
from sparsecache.longbench.sessions import batch_sizes, devices

VERSION = 1
Percent = Annotated[float, Range(0, 100)]
Share = Annotated[float, Range(0, 1)]
_PROMPT_DIGITS = 16  # digits of a SHA-256: a guard against accidental changes, not against attacks


@dataclass(frozen=True)
class BaselineDataset:
    """One dataset: metric, score in percent, kept share, and row scores and prompt hashes by `_id`.

    group: the datasets that it is averaged with (`Task.group`). strata: the `_id`s of each part of LongBench v2.
    """

    metric: str
    score: Percent | None
    kept: Number | None
    scores: dict[str, Share]
    prompts: dict[str, str]
    group: str = "longbench"
    strata: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """A run reduced to what a gate needs.

    unfinished: a phrase per incomplete dataset. scoring: the scoring options. identity: that of run.json, empty for
    predictions without one. tokens_per_s: decode speed over all rows, measured on `devices` with `batch_sizes`.
    datasets: by file stem.
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
        """The share of past tokens attended to, averaged over the datasets that report it."""
        shares = [dataset.kept for dataset in self.datasets.values() if dataset.kept is not None]
        return sum(shares) / len(shares) if shares else None

    @property
    def method(self) -> str:
        """The method's name, if it is known."""
        return str(self.identity.get("method", "unknown method"))

    def save(self, path: Path) -> None:
        """Write the file.

        Raises UsageError if that fails, and if `path` exists but is not a baseline.
        """
        if path.exists():
            load_baseline(path)
        record = {"sparsecache_baseline": VERSION, **asdict(self)}
        write_json(path, record)


def make_baseline(run: RunScore, options: ScoringOptions) -> Baseline:
    """Return a run as a baseline. Raises UsageError if some rows lack an `_id`, or share one.

    Rows of a dataset without any `_id` get a key by their order (`row_ids`).
    """
    speed = decode_speed(run.run) or {}
    return Baseline(
        name=str(run.folder),
        e=run.e,
        unfinished=[
            f"{dataset.task.file_stem(run.e)} {dataset.num_finished} of {dataset.num_requested} rows{_failed(dataset)}"
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
    """Read a saved baseline. Raises UsageError for any other file."""
    try:
        baseline = _parse(read_json(path))
    except SchemaError as error:
        problem = str(error)
    except ValueError as error:
        problem = f"it is not valid JSON ({one_line(error)})"
    else:
        return replace(baseline, name=str(path))
    raise UsageError(f"{path} is not a baseline: {problem}. Save one with --save_baseline under another name.")


def _parse(record: Any) -> Baseline:
    if not isinstance(record, dict) or "sparsecache_baseline" not in record:
        raise SchemaError("it lacks the key sparsecache_baseline")
    version = record["sparsecache_baseline"]
    if version != VERSION or isinstance(version, bool):
        raise SchemaError(f"its format version is {short(version)}, not {VERSION}")
    baseline = parse(Baseline, record)
    check_identity(baseline.identity)
    return baseline


def _failed(dataset: DatasetScore) -> str:
    failed = dataset.count("error_row")
    return f", {failed} failed" if failed else ""


def _dataset(dataset: DatasetScore, folder: Path) -> BaselineDataset:
    ids = [str(record["_id"]) for record in dataset.records if record.get("_id") is not None]
    if has_no_ids(dataset):
        ids = line_keys(dataset)
    if len(set(ids)) < len(dataset.records):
        raise UsageError(
            f"{dataset.task.name} of {folder} has rows with a repeated `_id`, or some without one, so they cannot be "
            f"matched with the rows of another run. Predict them again."
        )
    return BaselineDataset(
        metric=dataset.task.metric,
        score=dataset.summary.score,
        kept=dataset.kept.share if dataset.kept else None,
        scores=dict(zip(ids, (row.score for row in dataset.rows), strict=True)),
        prompts={
            row_id: prompt
            for row_id, record in zip(ids, dataset.records, strict=True)
            if (prompt := _prompt_key(record)) is not None
        },
        group=dataset.task.group,
        strata={
            name: [row_id for row_id, row in zip(ids, dataset.rows, strict=True) if name in row.strata]
            for name in dataset.strata
        },
    )


def _prompt_key(record: dict[str, Any]) -> str | None:
    """Return the first digits of the hashes of a row's prompt text and token ids."""
    hashes = [record.get("prompt_sha256"), record.get("prompt_ids_sha256")]
    known = [found[:_PROMPT_DIGITS] for found in hashes if isinstance(found, str)]
    return ":".join(known) if isinstance(hashes[0], str) else None


def same_prompt(first: str, second: str) -> bool:
    """Return whether two entries of `prompts` are equal: by token ids if both have them, else by text."""
    (first_text, _, first_ids), (second_text, _, second_ids) = first.partition(":"), second.partition(":")
    return first_ids == second_ids if first_ids and second_ids else first_text == second_text
