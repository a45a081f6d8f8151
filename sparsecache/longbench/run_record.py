"""run.json as a typed object: how a run was made, how many rows were asked for, and what its processes measured."""

from dataclasses import dataclass, field
from typing import Any, Literal

from sparsecache.longbench.schema import Amount, Count, SchemaError, parse

RUN_FILE = "run.json"
BY_DATASET = ("templates", "protocol", "data")  # the tables of an identity that have an entry per dataset


@dataclass(frozen=True)
class EngineClock:
    """Seconds and tokens of prefill and decode of one process, and the peak of its GPU memory in bytes."""

    prefill_s: Amount | None = None
    prefill_tokens: Amount | None = None
    decode_s: Amount | None = None
    decode_tokens: Amount | None = None
    peak_gpu_bytes: Amount | None = None


@dataclass(frozen=True)
class WorkerRecord:
    """What one worker did: its number, rows, busy seconds, and whether it died."""

    worker: Count
    rows: Count = 0
    seconds: Amount = 0.0
    died: bool = False


@dataclass(frozen=True)
class CacheRecord:
    """The model's layers, and the bytes that their caches allocate per token that a sequence has room for.

    full_token_nbytes: of the full cache. token_nbytes: on the layers' devices. host_token_nbytes: in host memory.
    """

    layers: Count | None = None
    full_token_nbytes: Amount | None = None
    token_nbytes: Amount | None = None
    host_token_nbytes: Amount | None = None


@dataclass(frozen=True)
class Session:
    """One process that worked on a run.

    data: where its rows came from. seconds: of a session with workers, from first to last row.
    """

    id: str | Count | None = None
    device: str | None = None
    gpu: str | None = None
    batch_size: Count | None = None
    clock: EngineClock | None = None
    cache: CacheRecord | None = None
    data: dict[str, Any] | None = None
    workers: list[WorkerRecord] | None = None
    seconds: Amount | None = None


@dataclass(frozen=True)
class ExpectedRows:
    """How many rows of a dataset were asked for, and how its prediction deviates from the dataset's protocol."""

    expected_rows: Count
    deviations: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ModelRecord:
    """What a reader must know of the checkpoint. note: from its table in configs/models.toml."""

    note: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Identity:
    """The parts of a run's identity that are read by name; its other values are only compared.

    checkpoint: a digest of its files. templates, protocol, data: by file stem.
    """

    checkpoint: str | None = None
    method: str | None = None
    options: dict[str, Any] | None = None
    engine: str | None = None
    dtype: str | None = None
    templates: dict[str, str] = field(default_factory=dict)
    protocol: dict[str, str] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """run.json. json: the file as it was read, with keys that are not named here; empty without a file.

    tasks: the tables of own tasks (`tasks.make_own_tasks`).
    """

    identity: Identity = Identity()
    model: ModelRecord = ModelRecord()
    datasets: dict[str, ExpectedRows] = field(default_factory=dict)
    sessions: list[Session] = field(default_factory=list)
    tasks: dict[str, Any] = field(default_factory=dict)
    json: dict[str, Any] = field(default_factory=dict)

    @property
    def expected_rows(self) -> dict[str, int]:
        """Rows asked for, by file stem."""
        return {stem: dataset.expected_rows for stem, dataset in self.datasets.items()}

    def deviations(self, stem: str) -> list[str]:
        """How the prediction of a dataset deviates from its protocol, by file stem."""
        return self.datasets[stem].deviations if stem in self.datasets else []

    @property
    def cache(self) -> CacheRecord:
        """The memory of the caches, as the latest session that records it measured it; empty without one."""
        return next((each.cache for each in reversed(self.sessions) if each.cache is not None), CacheRecord())

    @property
    def clocks(self) -> list[EngineClock]:
        """The clocks of all sessions that have one."""
        return [session.clock for session in self.sessions if session.clock is not None]

    def total(self, what: Literal["prefill_s", "prefill_tokens", "decode_s", "decode_tokens"]) -> float:
        """A figure summed over all sessions."""
        total: float = sum(getattr(clock, what) or 0 for clock in self.clocks)
        return total


def parse_run_record(value: Any) -> RunRecord:
    """Returns the content of run.json as a RunRecord. Raises SchemaError for a wrong field."""
    if not isinstance(value, dict):
        raise SchemaError("the file is not a JSON object")
    return parse(RunRecord, {**value, "json": value})


def check_identity(value: dict[str, Any], place: str = "identity") -> None:
    """Raises SchemaError for an identity with a wrong field."""
    parse(Identity, value, place)
