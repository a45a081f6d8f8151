"""The measurements: decode, prefill, and the replay of a whole benchmark's lengths."""

import csv
import gc
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from sparsecache.bench.limits import cache_nbytes, copy_rate, link_rate, prompt_limit, step_limit
from sparsecache.bench.lines import Line
from sparsecache.bench.models import Subject
from sparsecache.bench.stages import profiled
from sparsecache.cache.base import StepBytes
from sparsecache.cache.host import pinned_bytes
from sparsecache.engine.base import Clock, Engine, Request
from sparsecache.engine.generator import Generator
from sparsecache.errors import UsageError, one_line
from sparsecache.methods import parse_options
from sparsecache.runner.pending import STEP_BYTES

_RUNS, _SECONDS = 3, 8.0
_TOKEN_BYTES = 4  # of a prompt's text, about
_SHARES = ("kept", "gpu_cache_hit")  # in a method's report
_MOST_TOKENS = 2**24  # of a prompt or an answer in a workload
Found = TypeVar("Found")

PEERS: dict[str, dict[str, Any]] = {
    "transformers": {},
    "static": {"cache_implementation": "static"},
    "offloaded": {"cache_implementation": "offloaded"},
}
"""transformers' generate: with its own cache, a static one (which compiles), and one in host memory."""

OWN: dict[str, dict[str, str]] = {"vanilla": {}, "streamed": {"offload": "true"}}
"""Our own vanilla as a peer of other methods, and with its cache in host memory; what its options are."""


@dataclass(frozen=True)
class Way:
    """How our engine decodes: a method and its options, as on the command line."""

    method: str = "vanilla"
    options: dict[str, str] = field(default_factory=dict)

    def parsed(self) -> dict[str, Any]:
        """The options' values, with the defaults of those not given. Raises UsageError for one that is refused."""
        return parse_options(self.method, self.options)

    def __str__(self) -> str:
        return " ".join([self.method, *(f"{key}={value}" for key, value in self.options.items())])


@dataclass(frozen=True)
class Job:
    """Sequences to decode: how many tokens come before the answer, how many are decoded, how many at once."""

    tokens: int
    new_tokens: int
    batch: int = 1

    def requests(self, vocabulary: int, seed: int = 0) -> list[Request]:
        """As many random prompts as are decoded at once; nothing stops them."""
        drawn = random.Random(seed)
        prompts = [[drawn.randrange(3, vocabulary) for _ in range(self.tokens)] for _ in range(self.batch)]
        return [Request(key, prompt, self.new_tokens, ()) for key, prompt in enumerate(prompts)]


def decode(subject: Subject, jobs: Sequence[Job], peers: Sequence[str], ways: Sequence[Way]) -> Iterator[Line]:
    """Milliseconds of a decode step of each job in each way, beside the peers' (transformers' only without a batch).

    All ways of a job stand beside the same measurement of a peer.
    """
    for way in ways:  # options are refused before anything is measured
        subject.method(way.method, way.options)
    rates = _Rates(subject.device)
    for job in jobs:
        others: dict[str, float] | None = None
        for way in ways:
            ran = _run_own(subject, job, way)
            free_memory()
            if others is None:
                measured = [name for name in peers if job.batch == 1 or name in OWN]
                if left_out := [name for name in peers if name not in measured]:
                    names = ", ".join(left_out)
                    print(f"Not measured with {job.batch} sequences at a time, but with one: {names}.", file=sys.stderr)
                others = each_peer(measured, partial(_peer_step, subject, job))
            yield _decoded(subject, job, way, ran, rates, others)


class _Rates:
    """Bytes a second, measured once: of copies within the device, and from pinned host memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.copy = copy_rate(device)

    @cached_property
    def link(self) -> float | None:
        """None on a CPU, which has no link."""
        return link_rate(self._device) if self._device.type == "cuda" else None


class _RanOwn(NamedTuple):
    """As Ran, and the bytes of caches that a step must read, if they are known."""

    ran: "Ran"
    moved: StepBytes | None


def _run_own(subject: Subject, job: Job, way: Way) -> _RanOwn:
    decoder = subject.decoder(way.method, way.options)
    ran = run(Generator(decoder, job.batch), subject, job, _step)
    kept, hits = ([value for report in ran.reports if (value := report.get(key)) is not None] for key in _SHARES)
    seq_len = job.tokens + job.new_tokens // 2
    return _RanOwn(ran, cache_nbytes(decoder, seq_len, job.batch, _mean(kept), _mean(hits) or 0.0))


def _decoded(subject: Subject, job: Job, way: Way, own: _RanOwn, rates: _Rates, others: dict[str, float]) -> Line:
    (clock, reports, (on_gpu, pinned)), moved = own
    link = rates.link if moved is not None and moved.host else None
    notes = {
        "copy_bytes_per_s": rates.copy,
        "link_bytes_per_s": link,
        "fetched_bytes_per_step": sum(report.get("fetched_bytes") or 0 for report in reports) / (job.new_tokens - 1),
        "kept": [report["kept"] for report in reports if report.get("kept") is not None],
        "gpu_cache_hit": [report.get("gpu_cache_hit") for report in reports],
        "tokens_per_s": 1 / _step(clock),
        "peak_gpu_bytes": clock.peak_gpu_bytes,
        "cache_gpu_bytes": on_gpu,
        "cache_host_bytes": pinned,
    }
    limit = None if moved is None else step_limit(subject, moved, rates.copy, link)
    return Line(f"{job.tokens} tokens, batch {job.batch}, {way}", job.batch * _step(clock), limit, others, notes)


def _mean(numbers: Sequence[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None


def _peer_step(subject: Subject, job: Job, name: str) -> float:
    if name in OWN:
        return job.batch * _step(run(subject.engine("vanilla", OWN[name], job.batch), subject, job, _step).clock)
    return _step(run(subject.reference(**PEERS[name]), subject, job, _step).clock)


def _peer_prefill(subject: Subject, job: Job, name: str) -> float:
    return run(subject.reference(**PEERS[name]), subject, job, _first_token).clock.prefill_s


def prefill(subject: Subject, jobs: Sequence[Job], peers: Sequence[str]) -> Iterator[Line]:
    """Milliseconds from a prompt to its first token."""
    for job in jobs:
        short = Job(job.tokens, 2)
        clock = run(subject.engine(), subject, short, _first_token).clock
        others = each_peer(peers, partial(_peer_prefill, subject, short))
        notes = {"peak_gpu_bytes": clock.peak_gpu_bytes, "weights_bytes": subject.nbytes}
        limit = prompt_limit(subject, job.tokens)
        yield Line(f"prefill, {job.tokens} tokens", clock.prefill_s, limit, others, notes)


def replay(subject: Subject, workload: Path, rows: int, slots: int, peers: Sequence[str]) -> Iterator[Line]:
    """Milliseconds a prompt over a stratified subset of a benchmark, longest first, with its natural answers' lengths.

    workload: a CSV with the columns dataset, prompt_tokens, new_tokens, and max_new_tokens if the caps are known.
    """
    requests = requests_of(subject.architecture.vocabulary, workload, rows)
    engine = subject.engine(slots=slots)
    ours, clock = timed(engine, requests)
    slots = engine.slots  # fewer where memory does not suffice
    del engine
    if peers:  # which may take minutes
        print(f"{len(requests)} prompts took {ours:.1f} s; now the peers.", file=sys.stderr)
    free_memory()
    others = each_peer(peers, lambda name: timed(subject.reference(**PEERS[name]), requests)[0] / len(requests))
    notes = {
        "prompts_per_s": len(requests) / ours,
        "prefill_share": clock.prefill_s / ours,
        "decode_share": clock.decode_s / ours,
        "prompt_tokens": clock.prefill_tokens,
        "decode_tokens": clock.decode_tokens,
        "slots": slots,
    }
    yield Line(f"replay of {len(requests)} prompts, up to {slots} at once", ours / len(requests), None, others, notes)


def requests_of(vocabulary: int, workload: Path, rows: int) -> list[Request]:
    """A stratified subset of a workload as random prompts, longest first."""
    return [
        Request(key, job.requests(vocabulary, key)[0].token_ids, job.new_tokens, ())
        for key, job in enumerate(stratified(workload, rows))
    ]


def stratified(workload: Path, rows: int) -> list[Job]:
    """`rows` rows of a workload, of each dataset its share, evenly over its lengths; what may take longest first.

    That goes by prompt and cap, as a run on workers hands out its rows (work.py): answers are not known before. Fewer
    rows where the workload has fewer, more where it has more datasets, of which each gives one at least.
    Raises UsageError for a file without the columns.
    """
    by_dataset: dict[str, list[_Sized]] = {}
    try:
        with workload.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                sized = _Sized(int(row["prompt_tokens"]), int(row["new_tokens"]), int(row.get("max_new_tokens") or 0))
                by_dataset.setdefault(row["dataset"], []).append(sized)
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise UsageError(
            f"{workload} is no workload ({error!r}): a CSV with the columns dataset, prompt_tokens, new_tokens."
        ) from error
    total = sum(map(len, by_dataset.values()))
    if not total or not all(sized.fits() for part in by_dataset.values() for sized in part):
        raise UsageError(
            f"{workload} needs rows, and in each prompt_tokens from 1 and new_tokens from 0 on, up to {_MOST_TOKENS:,}."
        )
    chosen: list[_Sized] = []
    before = 0.0  # of the rows so far, those that are wanted; what rounding takes from one dataset, the next one gets
    for part in by_dataset.values():
        part.sort()
        wanted = before + rows * len(part) / total
        count = min(len(part), max(1, round(wanted) - round(before)))
        before = wanted
        chosen += [part[(2 * at + 1) * len(part) // (2 * count)] for at in range(count)]
    chosen.sort(key=lambda sized: -(sized.prompt + STEP_BYTES / _TOKEN_BYTES * sized.cap))
    return [Job(sized.prompt, max(1, sized.answer)) for sized in chosen]


class _Sized(NamedTuple):
    """A row of a workload, in tokens."""

    prompt: int
    answer: int
    cap: int

    def fits(self) -> bool:
        """Whether there may be such a row."""
        return 1 <= self.prompt <= _MOST_TOKENS and 0 <= self.answer <= _MOST_TOKENS


class Ran(NamedTuple):
    """An engine's clock over a job, what the method reports of each sequence, and bytes of its room: GPU, pinned."""

    clock: Clock
    reports: list[dict[str, Any]]
    room: tuple[int, int]


def run(engine: Engine, subject: Subject, job: Job, seconds: Callable[[Clock], float]) -> Ran:
    """An engine does a job.

    A first run is not counted (it compiles); of those in the next _SECONDS, _RUNS at most, the fastest by `seconds` is
    taken. Raises RuntimeError where memory does not suffice for all of its sequences at once.
    """
    requests = job.requests(subject.architecture.vocabulary)
    found: list[Ran] = []
    before = _held(subject.devices)
    _reserve(engine, job.tokens + job.new_tokens, job.new_tokens)
    on_gpu, pinned = (now - then for now, then in zip(_held(subject.devices), before, strict=True))
    _check_room(engine, job)
    _all(engine, requests)
    began = time.perf_counter()
    while not found or (len(found) < _RUNS and time.perf_counter() - began < _SECONDS):
        engine.reset_clock()
        reports = _all(engine, requests)
        found.append(Ran(engine.clock, reports, (on_gpu, pinned)))
    _check_room(engine, job)  # which runs may have found out
    return min(found, key=lambda each: seconds(each.clock))


def _reserve(engine: Engine, max_tokens: int, max_new_tokens: int) -> None:
    if isinstance(engine, Generator):
        engine.reserve(max_tokens, max_new_tokens)
    else:
        engine.reserve(max_tokens)


def _check_room(engine: Engine, job: Job) -> None:
    if isinstance(engine, Generator) and engine.slots < job.batch:
        raise RuntimeError(
            f"memory does not suffice for {job.batch} sequences of {job.tokens + job.new_tokens:,} tokens at once, but "
            f"for {engine.slots}: give --batch {engine.slots}."
        )


def _held(devices: Sequence[torch.device]) -> tuple[int, int]:
    """Bytes of tensors on GPUs, and of pinned keys and values."""
    return sum(torch.cuda.memory_allocated(device) for device in devices if device.type == "cuda"), pinned_bytes()


def profile(subject: Subject, job: Job, path: Path | None, way: Way) -> str:
    """A table of where the time of a job's steps goes, by stage; by kernel it is written to `path`."""
    engine = subject.engine(way.method, way.options, job.batch)
    engine.reserve(job.tokens + job.new_tokens + 2, job.new_tokens + 2)

    def decode(new_tokens: int) -> None:
        _all(engine, replace(job, new_tokens=new_tokens).requests(subject.architecture.vocabulary))

    return profiled(decode, job.new_tokens, subject.device.type == "cuda", path)


def timed(engine: Engine, requests: list[Request]) -> tuple[float, Clock]:
    """Seconds of all requests, after the first two alone, which are not counted, and the clock."""
    longest = max(len(request.token_ids) + request.max_new_tokens for request in requests)
    _reserve(engine, longest, max(request.max_new_tokens for request in requests))
    _all(engine, requests[:2])
    engine.reset_clock()
    began = time.perf_counter()
    _all(engine, requests)
    return time.perf_counter() - began, engine.clock


def _all(engine: Engine, requests: list[Request]) -> list[dict[str, Any]]:
    done = list(engine.generate(requests))
    failed = [each.error for each in done if each.error]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(requests)} prompts failed: {failed[0]}")
    return [each.report for each in done]


def _step(clock: Clock) -> float:
    return clock.decode_s / clock.decode_tokens


def _first_token(clock: Clock) -> float:
    return clock.prefill_s


def each_peer(names: Sequence[str], measure: Callable[[str], Found]) -> dict[str, Found]:
    """What is measured of each peer; one that fails, for want of memory say, is told and left out."""
    found = {}
    for name in names:
        try:
            found[name] = measure(name)
        except Exception as error:  # a peer's failure is no reason to lose our own measurement
            print(f"{name} was not measured: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        free_memory()
    return found


def free_memory() -> None:
    """Gives back what nothing uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
