"""What a sparse method reported of its rows, taken together. Knows the keys of rows and nothing of methods."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparsecache.longbench.jsonl import figure


@dataclass(frozen=True)
class Kept:
    """The rows that report `kept`, the mean share of past tokens attended to.

    share: its mean over `rows` rows, None if there are none; idle_rows: rows without a sparse step, and odd_rows: those
    that say something else than a share from 0 to 1, both of which are in no mean. sparse_steps, capped_steps and
    fetched_bytes are sums, gpu_cache_hit is a mean over the rows that have it.
    capped_rows: rows that had more past tokens than the method's cap at some step; dropping_rows: how many of these
    kept less than everything. dense_layers: the values found.
    """

    share: float | None
    rows: int
    idle_rows: int
    odd_rows: int
    sparse_steps: int
    capped_steps: int
    capped_rows: int
    dropping_rows: int
    dense_layers: frozenset[int]
    fetched_bytes: int | None
    gpu_cache_hit: float | None

    def as_json(self) -> dict[str, Any]:
        """For summary.json; what only some methods report stands there only where it was."""
        fields: dict[str, Any] = {
            "kept": None if self.share is None else round(self.share, 6),
            "kept_n": self.rows,
            "rows_without_sparse_step": self.idle_rows,
            "sparse_steps": self.sparse_steps,
            "capped_steps": self.capped_steps,
            "dense_layers": sorted(self.dense_layers),
        }
        if self.fetched_bytes is not None:
            fields |= {"fetched_bytes": self.fetched_bytes, "gpu_cache_hit": self.gpu_cache_hit}
        return fields


def kept_of(rows: Iterable[dict[str, Any]]) -> Kept | None:
    """What the finished rows among these report together; None where none does, as in runs of the full cache."""
    rows = [row for row in rows if "kept" in row and "error" not in row]
    if not rows:
        return None
    shares = [share for row in rows if (share := _share(row)) is not None]
    idle = sum(row["kept"] is None for row in rows)
    capped = [row for row in rows if figure(row, "capped_steps")]
    fetched = _figures(rows, "fetched_bytes")
    return Kept(
        share=_mean(shares),
        rows=len(shares),
        idle_rows=idle,
        odd_rows=len(rows) - len(shares) - idle,
        sparse_steps=int(sum(_figures(rows, "sparse_steps"))),
        capped_steps=int(sum(_figures(rows, "capped_steps"))),
        capped_rows=len(capped),
        dropping_rows=sum(share < 1 for row in capped if (share := _share(row)) is not None),
        dense_layers=frozenset(int(layers) for layers in _figures(rows, "dense_layers")),
        fetched_bytes=int(sum(fetched)) if fetched else None,
        gpu_cache_hit=_mean(_figures(rows, "gpu_cache_hit")),
    )


def percent(share: float | None) -> str:
    """A share as a cell of a table: one digit, two below 1 %, and - where there is none."""
    return "-" if share is None else f"{100 * share:.{1 if share >= 0.01 else 2}f}%"


def kept_lines(parts: Iterable[Kept | None]) -> Iterator[str]:
    """One line on what the `kept` of several datasets stands for, if any dataset reports it."""
    found = [part for part in parts if part is not None]
    if not found:
        return
    steps, rows, idle, odd = (
        sum(getattr(part, name) for part in found) for name in ("sparse_steps", "rows", "idle_rows", "odd_rows")
    )
    layers = sorted(layers for layers in frozenset().union(*(part.dense_layers for part in found)) if layers)
    yield (
        f"Kept: mean share of past tokens attended to, over {steps} sparse steps of {rows} rows"
        + (f" ({idle} more had no sparse step)" if idle else "")
        + (f" ({odd} more say something else than a share from 0 to 1, and are left out)" if odd else "")
        + (f"; dense layers: {' or '.join(map(str, layers))}" if layers else "")
        + "."
    )


def dropped_nothing(parts: Iterable[Kept | None]) -> int:
    """How many rows had more past tokens than the method's cap, if not one of them kept less than all; else 0.

    Options that are lossless by construction have no such row.
    """
    found = [part for part in parts if part is not None]
    return 0 if any(part.dropping_rows for part in found) else sum(part.capped_rows for part in found)


def _share(row: dict[str, Any]) -> float | None:
    """What a row kept; None where it says something else."""
    share = figure(row, "kept")
    return share if share is not None and 0 <= share <= 1 else None


def _figures(rows: Iterable[dict[str, Any]], key: str) -> list[float]:
    return [value for row in rows if (value := figure(row, key)) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
