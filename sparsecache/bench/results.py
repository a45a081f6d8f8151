"""Results: a measured time, its share of the roofline and its ratio to each baseline, as a table, JSON and a plot."""

import json
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsecache.bench.methods_table import MethodRow
from sparsecache.errors import UsageError, one_line
from sparsecache.files import write_atomically
from sparsecache.longbench.tables import Cell, Document, Table, number, records, render, words
from sparsecache.runner.provenance import code_commit
from sparsecache.versions import installed_versions


@dataclass(frozen=True)
class Result:
    """One measured time.

    seconds: of a decode step, a prompt or a start. tokens: produced or read in that time, None if that is not its
    measure. roofline_s: the least that the machine allows. baselines: seconds of each baseline for the same work.
    notes: further facts, JSON.
    """

    name: str
    seconds: float
    tokens: int | None = None
    roofline_s: float | None = None
    baselines: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def table(results: Sequence[Result]) -> str:
    """Return a table for the terminal: tokens per second, milliseconds, share of the roofline, speed-up per baseline.

    The share is roofline_s / seconds, the speed-up a baseline's seconds / seconds. Notes follow, one line a result.
    """
    baselines = list(dict.fromkeys(name for result in results for name in result.baselines))
    head = ["", "tokens/s", "ms", "roofline, ms", "of roofline, %", *(f"x {name}" for name in baselines)]
    rows: list[list[Cell]] = []
    for result in results:
        per_second = None if result.tokens is None else result.tokens / result.seconds
        limit, share = None, None
        if result.roofline_s is not None:
            limit, share = 1000 * result.roofline_s, 100 * result.roofline_s / result.seconds
        measured = (result.baselines.get(name) for name in baselines)
        speedups = [number(seconds and seconds / result.seconds, 2) for seconds in measured]
        time = number(1000 * result.seconds, 2)
        rows.append([words(result.name), number(per_second, 1), time, number(limit, 2), number(share, 1), *speedups])
    lines = [line for result in results if (line := _describe(result.notes))]
    return "\n".join([render(Document([Table("", head, rows)], records("", [])), "terminal").rstrip("\n"), *lines, ""])


def _describe(notes: dict[str, Any]) -> str:
    """Return the notes that a reader of the terminal needs, as text."""
    parts, before = [], 0.0
    if rate := notes.get("prompts_per_s"):
        parts.append(f"{rate:.2f} prompts per second")
    for share, name in (("prefill_share", "prefill"), ("decode_share", "decode")):
        if share in notes:
            parts.append(f"{100 * notes[share]:.1f} % {name}")
    for stage, seconds in notes.get("stages", {}).items():  # seconds since the start, in order
        parts.append(f"{stage} {seconds - before:.1f} s")
        before = seconds
    if kept := notes.get("kept"):
        parts.append(f"attended to {100 * sum(kept) / len(kept):.1f} % of past tokens in sparse layers")
    if fetched := notes.get("fetched_bytes_per_step"):
        parts.append(f"fetched {fetched / 1e6:.1f} MB per step")
    hits = [hit for hit in notes.get("gpu_cache_hit", ()) if hit is not None]
    if any(hits):
        parts.append(f"found {100 * sum(hits) / len(hits):.1f} % of it in the GPU cache")
    for key, name in (("cache_gpu_bytes", "GPU memory"), ("cache_host_bytes", "pinned host memory")):
        if notes.get(key):
            parts.append(f"cache in {name} {notes[key] / 2**30:.2f} GiB")
    if notes.get("peak_gpu_bytes"):
        parts.append(f"peak of GPU memory {notes['peak_gpu_bytes'] / 2**30:.2f} GiB")
    return "; ".join(parts)


def save_plot(results: Sequence[Result], path: Path) -> None:
    """Write a plot of results, or print that matplotlib is missing."""
    try:
        from sparsecache.bench.plot import draw
    except UsageError as error:
        print(f"Could not draw {path}: {one_line(error)}", file=sys.stderr)
        return
    draw(results).save(path)


def save(results: Iterable[Result | MethodRow], path: Path, **facts: Any) -> None:
    """Write results, the machine, the commit and the command line as JSON."""
    machine = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **installed_versions(),
    }
    content = {
        "argv": sys.argv, "commit": code_commit(), "machine": machine, **facts,
        "results": [asdict(result) for result in results],
    }  # fmt: skip
    write_atomically(path, json.dumps(content, indent=1) + "\n")
