"""The result of comparing runs, as tables and reports read it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparsecache.longbench.costs import CacheCosts
from sparsecache.longbench.run_record import RunRecord

Kind = Literal["dataset", "stratum", "category", "average"]


@dataclass(frozen=True)
class Difference:
    """The difference of a run to the first run, in one group.

    mean: points of the score, unrounded: the mean over rows, averaged over datasets as the group's score is.
    interval: 95 % bootstrap interval of the mean; None with fewer than MIN_ROWS rows, or if a dataset has a single row.
    wins, losses, ties: rows with a higher, lower or equal score. changed: rows with another text.
    """

    mean: float
    interval: tuple[float, float] | None
    wins: int
    losses: int
    ties: int
    changed: int


@dataclass(frozen=True)
class Entry:
    """The result of one run in one group.

    score, stderr: the official score and its standard error. best: whether no run scores higher, and one lower.
    kept: mean share of past tokens attended to in sparse layers; None without a sparse step.
    model_share: the same over all layers; None if unknown.
    tokens_per_s: decode tokens per second of these rows, from first to last token. In a batch this includes time
        spent on other rows, unlike the speed of a run.
    errors: failed rows, which count 0.0. difference: None for the first run.
    """

    score: float
    stderr: float | None
    kept: float | None
    model_share: float | None
    tokens_per_s: float | None
    errors: int
    best: bool
    difference: Difference | None


@dataclass(frozen=True)
class Group:
    """A dataset, stratum of LongBench v2, category or average, with an entry per run.

    `datasets` of `of_datasets` are present.
    """

    name: str
    kind: Kind
    n: int
    datasets: int
    of_datasets: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class ComparedRun:
    """A run as a whole, over all of its rows.

    left_out: rows that another run lacks. decode: speed and peak memory (`report.decode_speed`); None if run.json has
    none. cache: what its cache costs. record: run.json.
    """

    name: str
    folder: Path
    complete: bool
    rows: int
    left_out: int
    kept: float | None
    decode: dict[str, Any] | None
    cache: CacheCosts
    devices: list[str]
    record: RunRecord

    @property
    def note(self) -> str | None:
        """The note on the checkpoint in models.toml, if there is one."""
        return self.record.model.note

    @property
    def method(self) -> str | None:
        """The method's name, if run.json records it."""
        return self.record.identity.method

    @property
    def options(self) -> str:
        """The method's options in run.json as `key=value`, separated by commas."""
        return ", ".join(f"{key}={value}" for key, value in (self.record.identity.options or {}).items())


@dataclass(frozen=True)
class Comparison:
    """The comparison of runs over their common rows. Differences are to `runs[0]`.

    subject: the model and the data. notes: sentences that qualify the numbers.
    """

    runs: tuple[ComparedRun, ...]
    groups: tuple[Group, ...]
    subject: str
    notes: tuple[str, ...]
    e: bool
    seed: int
    resamples: int
