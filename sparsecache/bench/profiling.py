"""Profiles a decode step: on a GPU by kernel, on a CPU by operation."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from sparsecache.longbench.tables import Cell, Document, Table, number, records, render, words

_MAX_ROWS = 12
_MAX_NAME = 100  # characters; names of C++ templates have hundreds
_OWN_KERNEL = re.compile(r"_?([a-z][a-z_]*)_kernel")  # kernels of sparsecache/kernels end so
_Times = dict[str, tuple[float, float]]  # microseconds and calls per kernel


def row_label(kernel: str) -> str:
    """Return the row of a kernel in the table: its name for this project's kernels, "others" for libraries'."""
    own = _OWN_KERNEL.fullmatch(kernel)
    return own[1].replace("_", " ") if own else "others"


def profile_steps(decode: Callable[[int], object], new_tokens: int, gpu: bool, path: Path | None) -> str:
    """Return a table of microseconds and calls per decode step.

    decode: makes that many tokens after a prompt. On a GPU libraries' kernels are one row; on a CPU only the slowest
    operations are listed. path: where to write every kernel or operation. Kernels that run at the same time each count
    in full, so the sum may exceed the step. The prompt is measured with one step and subtracted.
    """
    short = _times(lambda: decode(2), gpu)
    long = _times(lambda: decode(2 + new_tokens), gpu)
    per_step: _Times = {}
    for kernel, (microseconds, count) in long.items():
        before, fewer = short.get(kernel, (0.0, 0.0))
        if count > fewer:
            # A prompt's time varies: the difference of its copies may be negative.
            per_step[kernel] = max(0.0, microseconds - before) / new_tokens, (count - fewer) / new_tokens
    if path is not None:
        path.write_text(_table(per_step, gpu))
    if not gpu:
        return _table(dict(sorted(per_step.items(), key=_by_time)[:_MAX_ROWS]), gpu)
    stages: _Times = {}
    for kernel, (microseconds, count) in per_step.items():
        before, fewer = stages.get(row_label(kernel), (0.0, 0.0))
        stages[row_label(kernel)] = before + microseconds, fewer + count
    return _table(stages, gpu)


def _table(times: _Times, gpu: bool) -> str:
    rows: list[list[Cell]] = [
        [words(_shorten(name)), number(microseconds, 1), number(count, 1), number(microseconds / count, 1)]
        for name, (microseconds, count) in sorted(times.items(), key=_by_time)
    ]
    head = ["", "microseconds per step", "kernels" if gpu else "operations", "microseconds each"]
    return render(Document([Table("", head, rows)], records("", [])), "terminal")


def _shorten(name: str) -> str:
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 3]}..."


def _by_time(item: tuple[str, tuple[float, float]]) -> float:
    return -item[1][0]


def _times(work: Callable[[], object], gpu: bool) -> _Times:
    """Return microseconds and calls of each kernel or operation."""
    work()  # compiles
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiled:
        work()
    averages: Any = profiled.key_averages()
    key = "self_device_time_total" if gpu else "self_cpu_time_total"
    times = {each.key: (float(getattr(each, key)), each.count) for each in averages}
    return {name: (time, count) for name, (time, count) in times.items() if time > 0}  # no host-side launches
