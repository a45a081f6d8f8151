"""Where the time of a decode step goes: on a GPU by stage, and by kernel; on a CPU by operation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from sparsecache.longbench.tables import Cell, Document, Table, number, records, render, words

_STAGES = {
    "matrix products": ("_linear_one_row_kernel", "_linear_few_rows_kernel"),
    "attention": ("_attend_kernel", "_merge_kernel"),
    "norms": ("_rms_norm_kernel",),
    "speculated scores": ("_score_kernel",),
    "selection": ("_count_tokens_kernel", "_select_tokens_kernel"),
    "GPU cache lookup": ("_lookup_kernel",),
    "GPU cache insertion": ("_insert_kernel", "_copy_rows_kernel"),
    "fetching rows": ("_gather_rows_kernel",),
    "appending the new token": ("_append_speculated_kernel",),
}
_MOST = 12  # rows
_LONGEST = 100  # characters of a kernel's name: templates have hundreds
_Seen = dict[str, tuple[float, float]]  # microseconds, and how often


def stage_of(kernel: str) -> str:
    """The stage that a kernel belongs to."""
    return next((stage for stage, kernels in _STAGES.items() if kernel in kernels), "others")


def profiled(decode: Callable[[int], object], new_tokens: int, gpu: bool, path: Path | None) -> str:
    """A table of microseconds and kernels a step by stage, or on a CPU of the operations that take longest.

    decode: makes so many tokens of a prompt. Kernels that run beside each other count each, so that the stages' sum may
    exceed the step. What the prompt takes is measured with one step and taken off. path: where to write the same by
    kernel, or on a CPU of every operation.
    """
    few = _seen(lambda: decode(2), gpu)
    many = _seen(lambda: decode(2 + new_tokens), gpu)
    each: _Seen = {}
    for kernel, (microseconds, count) in many.items():
        before, fewer = few.get(kernel, (0.0, 0.0))
        if count > fewer:
            # What a prompt takes varies, so that its copies might seem to have taken less than nothing of a step.
            each[kernel] = max(0.0, microseconds - before) / new_tokens, (count - fewer) / new_tokens
    if path is not None:
        path.write_text(_table(each, gpu))
    if not gpu:
        return _table(dict(sorted(each.items(), key=_by_time)[:_MOST]), gpu)
    stages: _Seen = {}
    for kernel, (microseconds, count) in each.items():
        before, fewer = stages.get(stage_of(kernel), (0.0, 0.0))
        stages[stage_of(kernel)] = before + microseconds, fewer + count
    return _table(stages, gpu)


def _table(seen: _Seen, gpu: bool) -> str:
    rows: list[list[Cell]] = [
        [words(_cut(name)), number(microseconds, 1), number(count, 1), number(microseconds / count, 1)]
        for name, (microseconds, count) in sorted(seen.items(), key=_by_time)
    ]
    head = ["", "microseconds a step", "kernels" if gpu else "operations", "microseconds each"]
    return render(Document([Table("", head, rows)], records("", [])), "terminal")


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..."


def _by_time(seen: tuple[str, tuple[float, float]]) -> float:
    return -seen[1][0]


def _seen(work: Callable[[], object], gpu: bool) -> _Seen:
    """Microseconds and calls of each kernel, or operation."""
    work()  # compiles
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as watched:
        work()
    averages: Any = watched.key_averages()
    key = "self_device_time_total" if gpu else "self_cpu_time_total"
    times = {each.key: (float(getattr(each, key)), each.count) for each in averages}
    return {name: (time, count) for name, (time, count) in times.items() if time > 0}  # not what the host called
