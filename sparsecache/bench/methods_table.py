"""The decode steps of many methods at one size, as rows of one table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from sparsecache.longbench.tables import Cell, Document, Table, number, records, render, words


@dataclass(frozen=True)
class MethodRow:
    """The decode step of a method or a baseline at one size; None where it was not measured.

    tokens, batch: prompt tokens of each sequence, and sequences. step_s: seconds of a step. vanilla_step_s: vanilla's.
    roofline_s: the least that the machine allows for the bytes that the method's caches state. kept: the share of past
    tokens that sparse layers attended to. cache_gpu_bytes, cache_host_bytes: allocated for all sequences.
    prefill_overhead_s: seconds of a prompt's prefill with the method, less prompt_s, vanilla's. graph: whether the step
    was a CUDA graph. error: why the measurement failed.
    """

    name: str
    tokens: int
    batch: int
    step_s: float | None = None
    vanilla_step_s: float | None = None
    roofline_s: float | None = None
    kept: float | None = None
    cache_gpu_bytes: int | None = None
    cache_host_bytes: int | None = None
    prefill_overhead_s: float | None = None
    prompt_s: float | None = None
    graph: bool | None = None
    error: str | None = None


HEAD = (
    "method", "ms", "tokens/s", "x vanilla", "of its limit, %", "attended, %", "GPU cache, GiB", "host cache, GiB",
    "prompt, + ms", "prompt, + %", "graph",
)  # fmt: skip


def methods_table(rows: Sequence[MethodRow], format: str = "terminal") -> str:
    """Return one table per size, with a line per method; `format`: as of longbench.tables.render."""
    tables, notes = [], []
    for (tokens, batch), group in groupby(rows, key=lambda row: (row.tokens, row.batch)):
        of_size = list(group)
        tables.append(Table(_title(tokens, batch, of_size), HEAD, [_cells(row) for row in of_size]))
        notes += [f"{row.name}, {tokens:,} tokens, batch {batch}: {row.error}" for row in of_size if row.error]
    return render(Document(tables, records("", []), notes=notes), format)


def _title(tokens: int, batch: int, rows: Iterable[MethodRow]) -> str:
    prompt_s = next((row.prompt_s for row in rows if row.prompt_s is not None), None)
    return f"{tokens:,} tokens, batch {batch}" + (f" (a prompt: {1000 * prompt_s:,.0f} ms)" if prompt_s else "")


def _cells(row: MethodRow) -> list[Cell]:
    step_s, overhead_s = row.step_s, row.prefill_overhead_s
    return [
        words(row.name),
        number(_scaled(step_s, 1000), 2),
        number(None if step_s is None else row.batch / step_s, 1),
        number(_ratio(row.vanilla_step_s, step_s), 2),
        number(_scaled(_ratio(row.roofline_s, step_s), 100), 1),
        number(_scaled(row.kept, 100), 1),
        number(_scaled(row.cache_gpu_bytes, 2**-30), 2),
        number(_scaled(row.cache_host_bytes, 2**-30), 2),
        number(_scaled(overhead_s, 1000), 1),
        number(_scaled(_ratio(overhead_s, row.prompt_s), 100), 1),
        words("failed" if row.error else "-" if row.graph is None else "yes" if row.graph else "no"),
    ]


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _ratio(value: float | None, over: float | None) -> float | None:
    return None if value is None or over is None else value / over
