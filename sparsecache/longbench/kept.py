"""Aggregates what sparse methods report per row: kept share, sparse steps, fetched bytes.

Independent of methods.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparsecache.longbench.jsonl import get_number


@dataclass(frozen=True)
class KeptStats:
    """Statistics over the rows that report `kept`, the mean share of past tokens attended to.

    share: mean over `rows` rows; None without such rows.
    rows_without_sparse_step, invalid_rows: rows that `share` leaves out, because they had no sparse step, or because
        their value is not a share from 0 to 1.
    sparse_steps, capped_steps, fetched_bytes: sums. gpu_cache_hit: mean over the rows that have it.
    capped_rows: rows with more past tokens than the method's budget at some step. dropping_rows: those of them that
        attended to less than all past tokens.
    dense_layers: the distinct values.
    """

    share: float | None
    rows: int
    rows_without_sparse_step: int
    invalid_rows: int
    sparse_steps: int
    capped_steps: int
    capped_rows: int
    dropping_rows: int
    dense_layers: frozenset[int]
    fetched_bytes: int | None
    gpu_cache_hit: float | None

    def as_json(self) -> dict[str, Any]:
        """Return the fields of summary.json. Fields that only some methods report may be absent."""
        fields: dict[str, Any] = {
            "kept": None if self.share is None else round(self.share, 6),
            "kept_n": self.rows,
            "rows_without_sparse_step": self.rows_without_sparse_step,
            "sparse_steps": self.sparse_steps,
            "capped_steps": self.capped_steps,
            "dense_layers": sorted(self.dense_layers),
        }
        if self.fetched_bytes is not None:
            fields |= {"fetched_bytes": self.fetched_bytes, "gpu_cache_hit": self.gpu_cache_hit}
        return fields


def aggregate_kept(rows: Iterable[dict[str, Any]]) -> KeptStats | None:
    """Return the statistics of the finished rows; None if no row reports `kept` (full cache)."""
    rows = [row for row in rows if "kept" in row and "error" not in row]
    if not rows:
        return None
    shares = [share for row in rows if (share := _share(row)) is not None]
    idle = sum(row["kept"] is None for row in rows)
    capped = [row for row in rows if get_number(row, "capped_steps")]
    fetched = _numbers(rows, "fetched_bytes")
    return KeptStats(
        share=_mean(shares),
        rows=len(shares),
        rows_without_sparse_step=idle,
        invalid_rows=len(rows) - len(shares) - idle,
        sparse_steps=int(sum(_numbers(rows, "sparse_steps"))),
        capped_steps=int(sum(_numbers(rows, "capped_steps"))),
        capped_rows=len(capped),
        dropping_rows=sum(share < 1 for row in capped if (share := _share(row)) is not None),
        dense_layers=frozenset(int(layers) for layers in _numbers(rows, "dense_layers")),
        fetched_bytes=int(sum(fetched)) if fetched else None,
        gpu_cache_hit=_mean(_numbers(rows, "gpu_cache_hit")),
    )


def format_percent(share: float | None) -> str:
    """Return a share in percent with one decimal, two below 1 %; - for None."""
    return "-" if share is None else f"{100 * share:.{1 if share >= 0.01 else 2}f}%"


def format_kept(parts: Iterable[KeptStats | None]) -> Iterator[str]:
    """Yield one line that explains the `kept` column of several datasets, if any reports it."""
    found = [part for part in parts if part is not None]
    if not found:
        return
    steps, rows, idle, invalid = (
        sum(getattr(part, name) for part in found)
        for name in ("sparse_steps", "rows", "rows_without_sparse_step", "invalid_rows")
    )
    layers = sorted(layers for layers in frozenset().union(*(part.dense_layers for part in found)) if layers)
    yield (
        f"Kept: mean share of past tokens attended to, over {steps} sparse steps of {rows} rows"
        + (f" ({idle} more had no sparse step)" if idle else "")
        + (f" ({invalid} more hold no share from 0 to 1 and are left out)" if invalid else "")
        + (f"; dense layers: {' or '.join(map(str, layers))}" if layers else "")
        + "."
    )


def count_undropped_rows(parts: Iterable[KeptStats | None]) -> int:
    """Return the number of rows over the budget if all of them attended to every token; else 0.

    With options that are lossless by construction, no row is over the budget.
    """
    found = [part for part in parts if part is not None]
    return 0 if any(part.dropping_rows for part in found) else sum(part.capped_rows for part in found)


def _share(row: dict[str, Any]) -> float | None:
    """Return the kept share of a row; None for any other value."""
    share = get_number(row, "kept")
    return share if share is not None and 0 <= share <= 1 else None


def _numbers(rows: Iterable[dict[str, Any]], key: str) -> list[float]:
    return [value for row in rows if (value := get_number(row, key)) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
