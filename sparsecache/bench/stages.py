"""Where the time of a decode step goes: on a GPU by stage, and by kernel; on a CPU by operation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from sparsecache.longbench.tables import Cell, Document, Table, number, records, render, words

_STAGES = {
    "matrix products": ("_project_one", "_project_few"),
    "attention": ("_attend", "_merge"),
    "norms": ("_rms_norm",),
    "speculated scores": ("_score",),
    "the cut": ("_measure", "_set_aside", "_write"),
    "looking up in gpu_cache": ("_look_up",),
    "fetching rows": ("_gather",),
    "keeping the new token": ("_remember", "_note"),
}
_MOST = 12  # rows
_Seen = dict[str, tuple[float, int]]


def stage_of(kernel: str) -> str:
    """The stage that a kernel belongs to."""
    return next((stage for stage, kernels in _STAGES.items() if kernel in kernels), "all else")


def profiled(decode: Callable[[int], object], new_tokens: int, gpu: bool, path: Path | None) -> str:
    """A table of microseconds and kernels a step by stage, or on a CPU of the operations that take longest.

    decode: makes so many tokens of a prompt. Kernels that run beside each other count each, so that the stages' sum may
    exceed the step. What the prompt takes is measured with one step and taken off. path: where to write the same by
    kernel, as torch.profiler tells it.
    """
    few, _ = _seen(lambda: decode(2), gpu)
    many, table = _seen(lambda: decode(2 + new_tokens), gpu)
    if path is not None:
        path.write_text(table)
    stages: dict[str, list[float]] = {}
    for kernel, (microseconds, count) in many.items():
        before, fewer = few.get(kernel, (0.0, 0))
        sums = stages.setdefault(stage_of(kernel) if gpu else kernel, [0.0, 0.0])
        sums[0] += (microseconds - before) / new_tokens
        sums[1] += (count - fewer) / new_tokens
    rows: list[list[Cell]] = [
        [words(stage), number(sums[0], 1), number(sums[1], 1)]
        for stage, sums in sorted(stages.items(), key=lambda each: -each[1][0])[:_MOST]
        if sums[1] > 0
    ]
    head = ["", "microseconds a step", "kernels" if gpu else "operations"]
    return render(Document([Table("", head, rows)], records("", [])), "terminal")


def _seen(work: Callable[[], object], gpu: bool) -> tuple[_Seen, str]:
    """Microseconds and calls of each kernel, or operation, and torch.profiler's own table."""
    work()  # compiles
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as watched:
        work()
    averages: Any = watched.key_averages()
    key = "self_device_time_total" if gpu else "self_cpu_time_total"
    seen = {each.key: (float(getattr(each, key)), int(each.count)) for each in averages}
    return seen, averages.table(sort_by=key, row_limit=40, max_name_column_width=60)
