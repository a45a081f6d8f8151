"""The measurements of scripts/bench.py: decode, prefill, and the replay of a benchmark's lengths."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from sparsecache.bench import roofline, timing
from sparsecache.bench.models import BenchModel
from sparsecache.bench.profiling import profile_steps
from sparsecache.bench.results import Result
from sparsecache.bench.specs import MethodSpec
from sparsecache.bench.timing import Measurement, free_memory, measure_baselines
from sparsecache.bench.workload import Workload
from sparsecache.cache.base import StepBytes
from sparsecache.engine.base import Request
from sparsecache.engine.generator import Generator

BASELINES: dict[str, dict[str, Any]] = {
    "transformers": {},
    "static": {"cache_implementation": "static"},
    "offloaded": {"cache_implementation": "offloaded"},
}
"""Baselines of transformers' generate: with its default cache, a static one (which compiles), one in host memory."""

OWN_BASELINES: dict[str, dict[str, str]] = {"vanilla": {}, "vanilla_offload": {"offload": "true"}}
"""Baselines of this engine's own full cache, in device and in host memory: options of vanilla."""

BaselineSeconds = Mapping[Workload, Mapping[str, float]]
"""Seconds of baselines that were measured in another process, by workload and name."""


def decode(
    model: BenchModel,
    workloads: Sequence[Workload],
    baselines: Sequence[str],
    specs: Sequence[MethodSpec],
    external_s: BaselineSeconds = MappingProxyType({}),
) -> Iterator[Result]:
    """Yield the time of a decode step of each workload with each method.

    All methods of a workload are compared with the same measurement of a baseline. transformers is measured with one
    sequence at a time only.
    """
    for spec in specs:  # raises for wrong options before anything is measured
        model.method(spec.method, spec.options)
    rates = roofline.Rates(model.device)
    for workload in workloads:
        baseline_s: dict[str, float] | None = None
        for spec in specs:
            measured = _measure_decode(model, workload, spec)
            free_memory()
            if baseline_s is None:
                names = baselines_for(workload, baselines)
                baseline_s = measure_baselines(names, partial(baseline_step_s, model, workload))
                baseline_s |= external_s.get(workload, {})
            yield _decode_result(model, workload, spec, measured, rates, baseline_s)


def prefill(
    model: BenchModel,
    workloads: Sequence[Workload],
    baselines: Sequence[str],
    external_s: BaselineSeconds = MappingProxyType({}),
) -> Iterator[Result]:
    """Yield the time from a prompt to its first token."""
    for workload in workloads:
        short = Workload(workload.tokens, 2)
        stats = timing.measure(model.engine(), short, model.vocab_size, model.devices, timing.prefill_s).stats
        baseline_s = measure_baselines(baselines, partial(_baseline_prefill_s, model, short))
        baseline_s |= external_s.get(workload, {})
        notes = {"peak_gpu_bytes": stats.peak_gpu_bytes, "weights_bytes": model.nbytes}
        limit = roofline.prefill_s(model, workload.tokens)
        name = f"prefill, {workload.tokens} tokens"
        yield Result(name, stats.prefill_s, workload.tokens, limit, baseline_s, notes)


def replay(
    model: BenchModel,
    requests: list[Request],
    slots: int,
    baselines: Sequence[str],
    spec: MethodSpec,
    external_s: Mapping[str, float] = MappingProxyType({}),
) -> Iterator[Result]:
    """Yield the time per prompt of requests in their order. external_s: seconds of all of them, by baseline."""
    engine = model.engine(spec.method, spec.options, slots)
    seconds, stats = timing.time_requests(engine, requests)
    slots = engine.slots  # fewer if memory does not suffice
    del engine
    if baselines:  # they may take minutes
        print(f"{len(requests)} prompts took {seconds:.1f} s; measuring the baselines.", file=sys.stderr)
    free_memory()

    def seconds_per_prompt(name: str) -> float:
        if name == "vanilla":
            return timing.time_requests(model.engine(slots=slots), requests)[0] / len(requests)
        return timing.time_requests(model.reference(**BASELINES[name]), requests)[0] / len(requests)

    notes = {
        "prompts_per_s": len(requests) / seconds,
        "prefill_share": stats.prefill_s / seconds,
        "decode_share": stats.decode_s / seconds,
        "prompt_tokens": stats.prefill_tokens,
        "decode_tokens": stats.decode_tokens,
        "slots": slots,
    }
    yield Result(
        f"replay of {len(requests)} prompts, up to {slots} at once, {spec}",
        seconds / len(requests),
        baselines={
            **measure_baselines(baselines, seconds_per_prompt),
            **{name: total_s / len(requests) for name, total_s in external_s.items()},
        },
        notes=notes,
    )


def profile_decode(model: BenchModel, workload: Workload, spec: MethodSpec, path: Path | None) -> str:
    """Return a table of the kernels of a workload's decode steps; with `path` each kernel is written there."""
    engine = model.engine(spec.method, spec.options, workload.batch)
    engine.reserve(workload.total_tokens + 2, workload.new_tokens + 2)

    def decode(new_tokens: int) -> None:
        timing.complete(engine, replace(workload, new_tokens=new_tokens).requests(model.vocab_size))

    return profile_steps(decode, workload.new_tokens, model.device.type == "cuda", path)


class _Measured(NamedTuple):
    """A measurement, and the cache bytes that a step must read; None if they are not known."""

    run: Measurement
    step_nbytes: StepBytes | None


def _measure_decode(model: BenchModel, workload: Workload, spec: MethodSpec) -> _Measured:
    decoder = model.decoder(spec.method, spec.options)
    engine = Generator(decoder, workload.batch)
    run = timing.measure(engine, workload, model.vocab_size, model.devices, timing.decode_step_s)
    kept, hit = run.mean_reported("kept"), run.mean_reported("gpu_cache_hit") or 0.0
    return _Measured(run, roofline.decode_step_nbytes(decoder, workload.mean_past, workload.batch, kept, hit))


def _decode_result(
    model: BenchModel,
    workload: Workload,
    spec: MethodSpec,
    measured: _Measured,
    rates: roofline.Rates,
    baselines: dict[str, float],
) -> Result:
    run, nbytes = measured
    notes = {
        "copy_bytes_per_s": rates.copy,
        "link_bytes_per_s": rates.link if nbytes is not None and nbytes.host else None,
        "step_cache_bytes": None if nbytes is None else asdict(nbytes),
        "fetched_bytes_per_step": sum(run.reported("fetched_bytes")) / (workload.new_tokens - 1),
        "kept": run.reported("kept"),
        "gpu_cache_hit": run.reported("gpu_cache_hit"),
        "peak_gpu_bytes": run.stats.peak_gpu_bytes,
        "cache_gpu_bytes": run.gpu_bytes,
        "cache_host_bytes": run.host_bytes,
    }
    return Result(
        f"{workload.tokens} tokens, batch {workload.batch}, {spec}",
        workload.batch * timing.decode_step_s(run.stats),
        workload.batch,
        None if nbytes is None else roofline.decode_step_s(model.nbytes, nbytes, rates),
        baselines,
        notes,
    )


def baselines_for(workload: Workload, baselines: Sequence[str]) -> list[str]:
    """Return the baselines that can be measured at a workload's batch size, and print the others."""
    chosen = [name for name in baselines if workload.batch == 1 or name in OWN_BASELINES]
    if left_out := [name for name in baselines if name not in chosen]:
        print(f"Measured only with --batch 1, not {workload.batch}: {', '.join(left_out)}.", file=sys.stderr)
    return chosen


def baseline_step_s(model: BenchModel, workload: Workload, name: str) -> float:
    """Return the seconds of a decode step of a baseline."""
    if name in OWN_BASELINES:
        own = model.engine("vanilla", OWN_BASELINES[name], workload.batch)
        run = timing.measure(own, workload, model.vocab_size, model.devices, timing.decode_step_s)
        return workload.batch * timing.decode_step_s(run.stats)
    reference = model.reference(**BASELINES[name])
    run = timing.measure(reference, workload, model.vocab_size, model.devices, timing.decode_step_s)
    return timing.decode_step_s(run.stats)


def _baseline_prefill_s(model: BenchModel, workload: Workload, name: str) -> float:
    reference = model.reference(**BASELINES[name])
    return timing.measure(reference, workload, model.vocab_size, model.devices, timing.prefill_s).stats.prefill_s
