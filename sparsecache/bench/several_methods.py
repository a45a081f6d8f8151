"""Measures many methods in one process, over the same weights, prompts and measurement of vanilla.

A prompt is computed once per length. Its keys and values, and the queries that a method reads, fill the slots of every
method and batch size. Each method also computes the whole prompt from its tokens, to measure the time of a prompt.
"""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import groupby
from types import MappingProxyType

import torch

from sparsecache.bench import roofline, timing
from sparsecache.bench.methods_table import MethodRow
from sparsecache.bench.models import BenchModel
from sparsecache.bench.modes import BaselineSeconds, baseline_step_s, baselines_for
from sparsecache.bench.specs import MethodSpec
from sparsecache.bench.workload import Workload
from sparsecache.cache.base import most_queries_read
from sparsecache.engine.base import Request
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.devices import synchronize
from sparsecache.engine.generator import Generator
from sparsecache.engine.prefill_cache import PrefillCache
from sparsecache.errors import UsageError, one_line

_REPEAT_S = 0.5  # a prompt is repeated for as long
_MOST_REPEATS = 10


class Prompt:
    """A prompt of one length. vanilla_s: seconds of vanilla's prefill of it.

    computed: its keys and values, and its last `queries` queries; None: all.
    """

    def __init__(self, model: BenchModel, tokens: int, queries: int | None = None) -> None:
        self.computed = PrefillCache(queries=queries)
        self._model = model
        self._token_ids = Workload(tokens, 2).requests(model.vocab_size)[0].token_ids
        self._seconds: dict[str, float] = {}
        self._prefill(model.decoder(prompts=self.computed))
        self.vanilla_s = self.seconds(MethodSpec())

    def seconds(self, spec: MethodSpec) -> float:
        """Return the seconds of a whole prefill with a method: the fewest of several, after one that may compile."""
        if repr(spec) not in self._seconds:  # two files may have one name
            decoder = self._model.decoder(spec.method, spec.options)
            self._prefill(decoder)
            measured = [self._prefill(decoder)]
            while sum(measured) < _REPEAT_S and len(measured) < _MOST_REPEATS:
                measured.append(self._prefill(decoder))
            self._seconds[repr(spec)] = min(measured)
            del decoder
            timing.free_memory()
        return self._seconds[repr(spec)]

    @torch.inference_mode()
    def _prefill(self, decoder: Decoder) -> float:
        """Return the seconds of a prefill in new caches."""
        token_ids = torch.tensor(self._token_ids, device=self._model.device)
        decoder.allocate(1, len(token_ids) + 1, 1)
        synchronize(decoder.devices)  # new caches are filled with zeros
        began = time.perf_counter()
        decoder.prefill(token_ids, 0).argmax().item()  # waits for the device
        return time.perf_counter() - began

    def requests(self, workload: Workload) -> list[Request]:
        """Return a workload's requests, all with this prompt."""
        return [Request(key, self._token_ids, workload.new_tokens, ()) for key in range(workload.batch)]


def measure_methods(
    model: BenchModel,
    workloads: Sequence[Workload],
    baselines: Sequence[str],
    specs: Sequence[MethodSpec],
    external_s: BaselineSeconds = MappingProxyType({}),
) -> Iterator[Iterator[MethodRow]]:
    """Yield, per workload, its rows: one per method and baseline. Workloads of one prompt length come together.

    specs: vanilla first. A method that fails gives a row with its error.
    """
    gc.freeze()  # a collection after each method takes 0.2 s if it searches all imported modules
    try:
        yield from _by_prompt(model, workloads, baselines, specs, external_s)
    finally:
        gc.unfreeze()


def _by_prompt(
    model: BenchModel,
    workloads: Sequence[Workload],
    baselines: Sequence[str],
    specs: Sequence[MethodSpec],
    external_s: BaselineSeconds,
) -> Iterator[Iterator[MethodRow]]:
    rates = roofline.Rates(model.device)
    queries = _most_queries_read(model, specs)
    for tokens, group in groupby(sorted(workloads, key=lambda each: each.tokens), key=lambda each: each.tokens):
        prompt: Prompt | str
        try:
            prompt = Prompt(model, tokens, queries)
        except Exception as error:
            prompt = _describe(error)
        for size in group:
            if isinstance(prompt, Prompt):
                yield _measure_size(model, prompt, size, baselines, specs, rates, external_s.get(size, {}))
            else:
                yield (MethodRow(str(spec), tokens, size.batch, error=prompt) for spec in specs)
        del prompt
        timing.free_memory()


def _most_queries_read(model: BenchModel, specs: Sequence[MethodSpec]) -> int | None:
    """Return how many of a prompt's last queries the methods read at most; None: all."""
    methods = []
    for spec in specs:
        with suppress(Exception):  # the method's line will have the error
            methods.append(model.method(spec.method, spec.options)[0])
    return most_queries_read(methods)


def _measure_size(
    model: BenchModel,
    prompt: Prompt,
    workload: Workload,
    baselines: Sequence[str],
    specs: Sequence[MethodSpec],
    rates: roofline.Rates,
    external_s: Mapping[str, float],
) -> Iterator[MethodRow]:
    """Yield a row per method, vanilla first, and per baseline."""
    vanilla_s: float | None = None
    for spec in specs:
        row = MethodRow(str(spec), workload.tokens, workload.batch, prompt_s=prompt.vanilla_s)
        try:
            row = replace(row, prefill_overhead_s=prompt.seconds(spec) - prompt.vanilla_s)
            row = _measure(model, prompt, workload, spec, rates, row)
        except Exception as error:  # the other methods are measured all the same
            row = replace(row, error=_describe(error))
        else:
            if vanilla_s is None and spec.method == "vanilla":
                vanilla_s = row.step_s
            row = replace(row, vanilla_step_s=vanilla_s)
        timing.free_memory()
        yield row
    measure_one = partial(baseline_step_s, model, workload)
    own = timing.measure_baselines(baselines_for(workload, baselines), measure_one)
    for name, step_s in (own | dict(external_s)).items():
        yield MethodRow(name, workload.tokens, workload.batch, step_s, vanilla_s)


def _measure(
    model: BenchModel, prompt: Prompt, workload: Workload, spec: MethodSpec, rates: roofline.Rates, row: MethodRow
) -> MethodRow:
    """Return the row with the measurement of a method's steps."""
    decoder = model.decoder(spec.method, spec.options, prompt.computed)
    engine = Generator(decoder, workload.batch)
    run = timing.measure_once(engine, workload, prompt.requests(workload), model.devices, lambda: decoder.graphable)
    kept, hit = run.mean_reported("kept"), run.mean_reported("gpu_cache_hit") or 0.0
    nbytes = roofline.decode_step_nbytes(decoder, workload.mean_past, workload.batch, kept, hit)
    return replace(
        row,
        step_s=workload.batch * timing.decode_step_s(run.stats),
        roofline_s=None if nbytes is None else roofline.decode_step_s(model.nbytes, nbytes, rates),
        kept=kept,
        cache_gpu_bytes=run.gpu_bytes if model.device.type == "cuda" else None,
        cache_host_bytes=run.host_bytes,
        graph=decoder.graphable,
    )


def _describe(error: Exception) -> str:
    return one_line(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {one_line(error)}"
