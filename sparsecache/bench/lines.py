"""What a measurement says: its time, its share of a limit, its ratio to each peer; as a table, JSON and a picture."""

import json
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsecache.errors import UsageError, one_line
from sparsecache.files import write_atomically
from sparsecache.longbench.tables import Cell, Document, Table, number, records, render, words
from sparsecache.versions import installed_versions


@dataclass(frozen=True)
class Line:
    """One thing measured: `seconds` each, what it could take at best, and what the peers take for the same.

    notes: anything else worth keeping, JSON.
    """

    what: str
    seconds: float
    limit: float | None = None
    peers: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def table(lines: Sequence[Line]) -> str:
    """Lines for the terminal: milliseconds, share of the limit in percent, how many times faster than each peer."""
    peers = list(dict.fromkeys(peer for line in lines for peer in line.peers))
    head = ["", "ms", "limit, ms", "of limit, %", *(f"x {peer}" for peer in peers)]
    rows: list[list[Cell]] = []
    for line in lines:
        share = None if line.limit is None else 100 * line.limit / line.seconds
        limit = None if line.limit is None else 1000 * line.limit
        ratios = [number(line.peers[peer] / line.seconds if peer in line.peers else None, 2) for peer in peers]
        rows.append([words(line.what), number(1000 * line.seconds, 2), number(limit, 2), number(share, 1), *ratios])
    said = [told for line in lines if (told := _said(line.notes))]
    return "\n".join([render(Document([Table("", head, rows)], records("", [])), "terminal").rstrip("\n"), *said, ""])


def _said(notes: dict[str, Any]) -> str:
    """Where the time of a start or a replay goes, what a method's step moved, and where its memory is, in words."""
    parts, before = [], 0.0
    if rate := notes.get("prompts_per_s"):
        parts.append(f"{rate:.2f} prompts a second")
    for share, name in (("prefill_share", "prefill"), ("decode_share", "decode")):
        if share in notes:
            parts.append(f"{100 * notes[share]:.1f} % {name}")
    for stage, seconds in notes.get("stages", {}).items():  # since the beginning, in order
        parts.append(f"{stage} {seconds - before:.1f} s")
        before = seconds
    if kept := notes.get("kept"):
        parts.append(f"attended to {100 * sum(kept) / len(kept):.1f} % of the past in sparse layers")
    if fetched := notes.get("fetched_bytes_per_step"):
        parts.append(f"fetched {fetched / 1e6:.1f} MB a step")
    hits = [hit for hit in notes.get("gpu_cache_hit", ()) if hit is not None]
    if any(hits):
        parts.append(f"found {100 * sum(hits) / len(hits):.1f} % in gpu_cache")
    for where, name in (("cache_gpu_bytes", "GPU"), ("cache_host_bytes", "pinned host memory")):
        if notes.get(where):
            parts.append(f"cache in {name} {notes[where] / 2**30:.2f} GiB")
    if notes.get("peak_gpu_bytes"):
        parts.append(f"peak of GPU memory {notes['peak_gpu_bytes'] / 2**30:.2f} GiB")
    return "; ".join(parts)


def save_picture(lines: Sequence[Line], path: Path) -> None:
    """Draws lines, or says that matplotlib is missing."""
    try:
        from sparsecache.bench.picture import draw
    except UsageError as error:
        print(f"{path} was not drawn: {one_line(error)}", file=sys.stderr)
        return
    draw(lines).save(path)


def save(lines: Iterable[Line], path: Path, **facts: Any) -> None:
    """Writes lines, the machine and the command as JSON."""
    cuda = torch.cuda.is_available()
    machine = {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **installed_versions(),
    }
    told = {"argv": sys.argv, "machine": machine, **facts, "lines": [asdict(line) for line in lines]}
    write_atomically(path, json.dumps(told, indent=1) + "\n")
