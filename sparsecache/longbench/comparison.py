"""What a comparison of runs consists of. Tables and reports read these fields."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparsecache.longbench.run_record import RunRecord

Kind = Literal["dataset", "category", "average"]


@dataclass(frozen=True)
class Versus:
    """A run against the first run, on one line.

    difference: in points of the score, unrounded; the mean of the rows' differences, averaged as the line's scores
    are. interval: its 95 % bootstrap interval, None where a dataset has one row. wins, losses, ties: rows that score
    more, less, the same. changed: rows whose text is another one.
    """

    difference: float
    interval: tuple[float, float] | None
    wins: int
    losses: int
    ties: int
    changed: int


@dataclass(frozen=True)
class Entry:
    """One run on one line: its score and standard error as the scorer gives them, and whether no run is better.

    kept: mean share of past tokens attended to, None without a sparse step. tokens_per_s: decode speed as these rows
    saw it, first to last token (other rows of a batch included, unlike in a run's own speed). errors: rows that failed
    and count 0.0. versus: None for the first run.
    """

    score: float
    stderr: float | None
    kept: float | None
    tokens_per_s: float | None
    errors: int
    best: bool
    versus: Versus | None


@dataclass(frozen=True)
class Line:
    """One dataset, category or average: over how many rows, of how many of its datasets, and an entry for each run."""

    name: str
    kind: Kind
    n: int
    datasets: int
    of: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class ComparedRun:
    """A run as a whole, over all of its rows.

    left_out: its rows that another run lacks. decode: speed and peak memory (report.decode_speed), None if run.json
    has none. record: run.json.
    """

    name: str
    folder: Path
    complete: bool
    rows: int
    left_out: int
    kept: float | None
    decode: dict[str, Any] | None
    devices: list[str]
    record: RunRecord

    @property
    def note(self) -> str | None:
        """What the checkpoint's table says that a reader must know."""
        return self.record.model.note

    @property
    def method(self) -> str | None:
        """The method's name, as far as run.json says."""
        return self.record.identity.method

    @property
    def options(self) -> str:
        """The method's options, as far as run.json says: `key=value`, with commas between."""
        return ", ".join(f"{key}={value}" for key, value in (self.record.identity.options or {}).items())


@dataclass(frozen=True)
class Comparison:
    """Everything known of runs over their common rows. `runs[0]` is the one that differences are taken to.

    notes: full sentences on what a reader must know.
    """

    runs: tuple[ComparedRun, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    e: bool
    seed: int
    resamples: int
