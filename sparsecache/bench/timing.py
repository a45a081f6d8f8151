"""Times an engine over a workload: a first run to compile, then the fastest of a few."""

import gc
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from sparsecache.bench.workload import Workload
from sparsecache.cache.host import pinned_bytes
from sparsecache.engine.base import Engine, EngineStats, Request
from sparsecache.engine.generator import Generator
from sparsecache.errors import one_line

_MAX_RUNS, _MAX_SECONDS = 3, 8.0
Measured = TypeVar("Measured")


class Measurement(NamedTuple):
    """The fastest run: the engine's stats, each sequence's report, and the bytes that `reserve` allocated."""

    stats: EngineStats
    reports: list[dict[str, Any]]
    gpu_bytes: int
    host_bytes: int


def measure(
    engine: Engine,
    workload: Workload,
    vocab_size: int,
    devices: Sequence[torch.device],
    seconds: Callable[[EngineStats], float],
) -> Measurement:
    """Run a workload and return the fastest run by `seconds`.

    The first run is not counted, since it compiles. Then runs begin for _MAX_SECONDS, at most _MAX_RUNS. Raises
    RuntimeError if memory does not suffice for all sequences at once.
    """
    requests = workload.requests(vocab_size)
    before = _allocated_bytes(devices)
    engine.reserve(workload.total_tokens, workload.new_tokens)
    gpu_bytes, host_bytes = (now - then for now, then in zip(_allocated_bytes(devices), before, strict=True))
    _check_slots(engine, workload)
    complete(engine, requests)
    measured: list[Measurement] = []
    began = time.perf_counter()
    while not measured or (len(measured) < _MAX_RUNS and time.perf_counter() - began < _MAX_SECONDS):
        engine.reset_stats()
        reports = complete(engine, requests)
        measured.append(Measurement(engine.stats, reports, gpu_bytes, host_bytes))
    _check_slots(engine, workload)  # a run may have run out of memory
    return min(measured, key=lambda each: seconds(each.stats))


def time_requests(engine: Engine, requests: list[Request]) -> tuple[float, EngineStats]:
    """Return the seconds of all requests and the stats, after the first two requests alone, which are not counted."""
    longest = max(len(request.token_ids) + request.max_new_tokens for request in requests)
    engine.reserve(longest, max(request.max_new_tokens for request in requests))
    complete(engine, requests[:2])
    engine.reset_stats()
    began = time.perf_counter()
    complete(engine, requests)
    return time.perf_counter() - began, engine.stats


def complete(engine: Engine, requests: list[Request]) -> list[dict[str, Any]]:
    """Complete all requests and return their reports. Raises RuntimeError if one fails."""
    completions = list(engine.generate(requests))
    errors = [each.error for each in completions if each.error]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(requests)} prompts failed: {errors[0]}")
    return [each.report for each in completions]


def check_workers(workers: list[dict[str, Any]], count: int) -> None:
    """Raise RuntimeError if a worker died; workers: those that worked, as `Workers.session` gives them."""
    if len(workers) != count or any(worker["died"] for worker in workers):
        raise RuntimeError(f"one of {count} workers died and was replaced, so the time is not comparable.")


def decode_step_s(stats: EngineStats) -> float:
    """Return seconds of decoding per token."""
    return stats.decode_s / stats.decode_tokens


def prefill_s(stats: EngineStats) -> float:
    """Return seconds of prefill."""
    return stats.prefill_s


def measure_baselines(names: Sequence[str], measure_one: Callable[[str], Measured]) -> dict[str, Measured]:
    """Return a measurement per baseline; one that fails is reported on stderr and left out."""
    measured = {}
    for name in names:
        try:
            measured[name] = measure_one(name)
        except Exception as error:  # a baseline's failure must not lose the engine's own measurement
            print(f"Could not measure {name}: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        free_memory()
    return measured


def free_memory() -> None:
    """Collect garbage and return cached GPU memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_slots(engine: Engine, workload: Workload) -> None:
    if isinstance(engine, Generator) and engine.slots < workload.batch:
        raise RuntimeError(
            f"memory suffices for {engine.slots} of {workload.batch} sequences of {workload.total_tokens:,} tokens: "
            f"give --batch {engine.slots}."
        )


def _allocated_bytes(devices: Sequence[torch.device]) -> tuple[int, int]:
    """Return the bytes of tensors on GPUs, and of keys and values in pinned host memory."""
    return sum(torch.cuda.memory_allocated(device) for device in devices if device.type == "cuda"), pinned_bytes()
