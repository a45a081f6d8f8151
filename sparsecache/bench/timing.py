"""Times an engine over a workload: a first run to compile, then the fastest of a few."""

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch

from sparsecache.bench.workload import Workload
from sparsecache.cache.host import pinned_bytes
from sparsecache.engine.base import Completion, Engine, EngineStats, OnTokens, Request, ignore_tokens
from sparsecache.engine.generator import Generator
from sparsecache.errors import one_line

_MAX_RUNS, _MAX_SECONDS = 3, 8.0
_WARM_UP_TOKENS, _MIN_TOKENS = 4, 5
_SHORT_SECONDS = 2.0  # longest decode time of a short run
_MAX_PROMPTS_SECONDS = 30.0  # longest time of a method's own work on the prompts of a short run
Measured = TypeVar("Measured")


class Measurement(NamedTuple):
    """A run: the engine's stats, each sequence's completion, and the bytes that `reserve` allocated."""

    stats: EngineStats
    completions: list[Completion]
    gpu_bytes: int
    host_bytes: int

    def reported(self, key: str) -> list[float]:
        """Return a key's numbers in the sequences' reports."""
        return [value for each in self.completions if (value := each.report.get(key)) is not None]

    def mean_reported(self, key: str) -> float | None:
        """Return the mean of a key's numbers in the sequences' reports; None if there are none."""
        numbers = self.reported(key)
        return sum(numbers) / len(numbers) if numbers else None


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
    gpu_bytes, host_bytes = _reserve(engine, workload, devices)
    complete(engine, requests)
    measured: list[Measurement] = []
    began = time.perf_counter()
    while not measured or (len(measured) < _MAX_RUNS and time.perf_counter() - began < _MAX_SECONDS):
        engine.reset_stats()
        completions = complete(engine, requests)
        measured.append(Measurement(engine.stats, completions, gpu_bytes, host_bytes))
    _check_slots(engine, workload)  # a run may have run out of memory
    return min(measured, key=lambda each: seconds(each.stats))


def measure_once(
    engine: Generator,
    workload: Workload,
    requests: list[Request],
    devices: Sequence[torch.device],
    is_graph: Callable[[], bool],
) -> Measurement:
    """Run a workload's requests once, after a few tokens that compile.

    A step that is not a CUDA graph may be slow. Then there are fewer new tokens, for about _SHORT_SECONDS. is_graph:
    whether it is one, called when caches are allocated. Raises RuntimeError as `measure`, and if the prompts would take
    more than _MAX_PROMPTS_SECONDS.
    """
    gpu_bytes, host_bytes = _reserve(engine, workload, devices)
    stamps: list[float] = []
    first = requests[:1] if is_graph() else requests  # a capture has compiled the step of all rows
    warm_up = [replace(each, max_new_tokens=min(each.max_new_tokens, _WARM_UP_TOKENS)) for each in first]
    slowest = max(complete(engine, warm_up, lambda tokens: stamps.append(time.perf_counter())), key=_own_prefill_s)
    if len(requests) * _own_prefill_s(slowest) > _MAX_PROMPTS_SECONDS:  # once more, since that may have compiled
        _check_prompts(len(requests), _own_prefill_s(complete(engine, warm_up[:1])[0]))
    if not is_graph():
        affordable = max(_MIN_TOKENS, int(_SHORT_SECONDS / max(stamps[-1] - stamps[-2], 1e-9)))
        requests = [replace(each, max_new_tokens=min(each.max_new_tokens, affordable)) for each in requests]
    engine.reset_stats()
    completions = complete(engine, requests)
    _check_slots(engine, workload)
    return Measurement(engine.stats, completions, gpu_bytes, host_bytes)


def _own_prefill_s(completion: Completion) -> float:
    return completion.prefill_s - completion.shared_prefill_s


def _check_prompts(prompts: int, seconds: float) -> None:
    if prompts * seconds > _MAX_PROMPTS_SECONDS:
        raise RuntimeError(
            f"a prompt takes {seconds:.1f} s, {prompts} of them more than {_MAX_PROMPTS_SECONDS:.0f} s. Measure this "
            f"method with --method."
        )


def time_requests(engine: Engine, requests: list[Request]) -> tuple[float, EngineStats]:
    """Return the seconds of all requests and the stats, after the first two requests alone, which are not counted."""
    longest = max(len(request.token_ids) + request.max_new_tokens for request in requests)
    engine.reserve(longest, max(request.max_new_tokens for request in requests))
    complete(engine, requests[:2])
    engine.reset_stats()
    began = time.perf_counter()
    complete(engine, requests)
    return time.perf_counter() - began, engine.stats


def complete(engine: Engine, requests: list[Request], on_tokens: OnTokens = ignore_tokens) -> list[Completion]:
    """Complete all requests. Raises RuntimeError if one fails."""
    completions = list(engine.generate(requests, on_tokens))
    errors = [each.error for each in completions if each.error]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(requests)} prompts failed: {errors[0]}")
    return completions


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


def _reserve(engine: Engine, workload: Workload, devices: Sequence[torch.device]) -> tuple[int, int]:
    """Allocate for a workload and return the bytes on GPUs and in pinned host memory; RuntimeError if they lack."""
    before = _allocated_bytes(devices)
    engine.reserve(workload.total_tokens, workload.new_tokens)
    _check_slots(engine, workload)
    gpu_bytes, host_bytes = (now - then for now, then in zip(_allocated_bytes(devices), before, strict=True))
    return gpu_bytes, host_bytes


def _check_slots(engine: Engine, workload: Workload) -> None:
    if isinstance(engine, Generator) and engine.slots < workload.batch:
        raise RuntimeError(
            f"memory suffices for {engine.slots} of {workload.batch} sequences of {workload.total_tokens:,} tokens: "
            f"give --batch {engine.slots}."
        )


def _allocated_bytes(devices: Sequence[torch.device]) -> tuple[int, int]:
    """Return the bytes of tensors on GPUs, and of keys and values in pinned host memory."""
    return sum(torch.cuda.memory_allocated(device) for device in devices if device.type == "cuda"), pinned_bytes()
