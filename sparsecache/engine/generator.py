"""Greedy generation with continuous batching: prompts are prefilled into free slots and decoded together.

In one file because the scheduler, its queue and its handling of failures share the state of the slots.
"""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch

from sparsecache.cache.model_cache import ModelCache
from sparsecache.engine.base import (
    Completion,
    OnTokens,
    Request,
    SlotDecoder,
    failed_completion,
    ignore_tokens,
    new_stats,
    not_finite_completion,
)
from sparsecache.engine.devices import synchronize
from sparsecache.engine.steps import EagerSteps, StepHandle, Steps, TokenReadback, greedy_tokens, make_steps


@dataclass(eq=False)
class _Sequence:
    """A request in flight.

    slot: of the caches. new_ids: generated tokens so far, -1 for logits that are not finite. prefill_s and
    shared_prefill_s: as of Completion. first_token_at: when it had its first token, by time.perf_counter.
    """

    request: Request
    slot: int
    new_ids: list[int]
    prefill_s: float
    shared_prefill_s: float
    first_token_at: float

    @property
    def position(self) -> int:
        """Return the position of the newest token, the input of the next step."""
        return len(self.request.token_ids) + len(self.new_ids) - 1

    @property
    def finish_reason(self) -> str:
        """Return "stop", "length", "error" (logits that are not finite), or "" while it is decoded."""
        if self.new_ids[-1] < 0:
            return "error"
        if self.new_ids[-1] in self.request.stop_ids and len(self.new_ids) > self.request.min_new_tokens:
            return "stop"
        return "length" if len(self.new_ids) >= self.request.max_new_tokens else ""


@dataclass
class _Step:
    """A step in flight, and the sequences in its batch."""

    sequences: list[_Sequence]
    handle: StepHandle


class _RequestQueue:
    """The requests that have not started. They are drawn from the caller's iterable only when needed."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._rest = iter(requests)
        self._front: list[Request] = []

    def peek(self, index: int = 0) -> Request | None:
        """Return the request at an index without removing it; None if there is none."""
        self._front.extend(islice(self._rest, max(0, index + 1 - len(self._front))))
        return self._front[index] if index < len(self._front) else None

    def drop_first(self) -> None:
        """Remove the first request."""
        del self._front[0]

    def put_back(self, requests: Iterable[Request]) -> None:
        """Put requests before all others."""
        self._front[:0] = requests


class Generator:
    """The engine over a decoder. It draws at most one request more than it can start.

    At most `slots` sequences are in flight, fewer if memory is short. A failed prompt becomes a completion with an
    error, and the others continue. If a step fails, every request in flight fails. If memory runs out with several
    requests in flight, all of them restart with half as many slots; a single request fails.

    Where possible, a step is launched before the previous one is read, so that the device does not wait for the host.
    A sequence that a stop id ends has then been decoded for one extra step, which is discarded.
    """

    def __init__(self, decoder: SlotDecoder, slots: int):
        self.stats = new_stats(*decoder.devices)
        self._decoder = decoder
        self._max_slots = self._slots = slots
        self._max_tokens = self._max_new_tokens = 0  # per slot; 0: nothing is allocated
        self._steps: Steps = EagerSteps(decoder)
        self._in_flight: _Step | None = None  # launched before the previous step was read

    @property
    def slots(self) -> int:
        """Return how many sequences may be in flight at once."""
        return self._slots

    @torch.inference_mode()
    def reserve(self, max_tokens: int, max_new_tokens: int | None = None) -> None:
        """Allocate for sequences of max_tokens, in as many slots as memory allows.

        max_new_tokens: the most of them that are new; None: all may be. Without `reserve`, each request that is longer
        than all before it reallocates the caches.
        """
        self._slots = self._max_slots
        while not self._try_allocate(max_tokens, max_new_tokens or max_tokens) and self._slots > 1:
            self._slots = max(1, self._slots * 3 // 4)

    def _try_allocate(self, max_tokens: int, max_new_tokens: int) -> bool:
        """Allocate; return whether memory suffices. With several slots it must also suffice for a prefill."""
        try:
            self._allocate(max_tokens, max_new_tokens)
            devices, needed = self._decoder.devices, self._decoder.prompt_nbytes(max_tokens)
            if self._slots > 1 and any(free_nbytes(device) <= needed for device in devices):
                return False
            self._make_steps(max_tokens, max_new_tokens)
        except torch.OutOfMemoryError:  # with one slot, only the requests that do not fit fail
            self._max_tokens = 0
            return False
        return True

    def reset_stats(self) -> None:
        """Set the totals and the peak of GPU memory to zero."""
        self.stats = new_stats(*self._decoder.devices)

    def session(self) -> dict[str, Any]:
        """Return the stats as "clock", their key in run.json, and the memory of the caches as "cache"."""
        cache = self._decoder.cache
        return {"clock": asdict(self.stats), **({"cache": cache.memory.as_json()} if cache else {})}

    def generate(self, requests: Iterable[Request], on_tokens: OnTokens = ignore_tokens) -> Iterator[Completion]:
        """Yield a completion per request, in the order in which they end."""
        queue = _RequestQueue(requests)
        active: dict[int, _Sequence] = {}
        self._discard_in_flight()  # a step of an earlier call that its caller did not finish
        while active or queue.peek() is not None:
            short_of_memory = False
            try:
                while (request := queue.peek()) is not None and self._can_start(request, active):
                    if self._in_flight is not None:
                        yield from self._step(active, on_tokens, ahead=False)
                        continue
                    started = self._start(request, queue.peek(1), active)
                    queue.drop_first()
                    if started is None or started.error is None:
                        on_tokens(1)
                    if started is not None:
                        yield started
                yield from self._step(active, on_tokens)
            except torch.OutOfMemoryError:
                short_of_memory = True
            if short_of_memory:  # outside `except`: the error's frames hold tensors, which would stay allocated
                self._shrink(queue, active)

    def _can_start(self, request: Request, active: dict[int, _Sequence]) -> bool:
        """Return whether a free slot has capacity. Caches are reallocated only when nothing is in flight."""
        return not active or (len(active) < self._slots and self._has_capacity(request))

    def _has_capacity(self, request: Request) -> bool:
        return _num_tokens(request) <= self._max_tokens and request.max_new_tokens <= self._max_new_tokens

    def _shrink(self, queue: _RequestQueue, active: dict[int, _Sequence]) -> None:
        """Requeue all requests in flight, and halve the slots."""
        before, self._slots = self._slots, self._slots // 2
        print(
            f"Warning: out of memory with up to {before} sequences at a time. Continuing with up to {self._slots}.",
            file=sys.stderr,
        )
        queue.put_back([sequence.request for sequence in active.values()])
        active.clear()
        self._discard_in_flight()
        self._max_tokens = 0
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _start(self, request: Request, next_request: Request | None, active: dict[int, _Sequence]) -> Completion | None:
        """Prefill a request; return its completion if it ends with its first token or fails.

        While the device works, the host plans the attention of the next request. Raises OutOfMemoryError if fewer slots
        could help.
        """
        slot = next(slot for slot in range(self._slots) if slot not in active)
        try:
            if not self._has_capacity(request):
                max_new_tokens = max(request.max_new_tokens, self._max_new_tokens)
                max_tokens = max(_num_tokens(request), self._max_tokens)
                self._allocate(max_tokens, max_new_tokens)
                self._make_steps(max_tokens, max_new_tokens)
            began = time.perf_counter()
            token_ids = torch.tensor(request.token_ids, device=self._decoder.device)
            logits = self._decoder.prefill(token_ids, slot)[None]
            readback = TokenReadback(1, logits.device)
            readback.copy(greedy_tokens(logits))
            if next_request is not None:
                with suppress(Exception):  # its own prefill reports the error
                    self._decoder.warm_attention_plan(len(next_request.token_ids))
            first = self._pick_tokens([request], [0], logits, readback.read(1))[0]
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) and self._slots > 1:
                raise
            return self._fail(request, slot, error)
        now = time.perf_counter()
        self.stats.prefill_tokens += len(request.token_ids)
        shared_s = self._decoder.shared_prefill_s
        prefill_s = now - began + shared_s
        self.stats.prefill_s += prefill_s
        sequence = _Sequence(request, slot, [first], prefill_s, shared_s, now)
        if sequence.finish_reason:
            return self._finish(sequence, now)
        active[slot] = sequence
        return None

    @torch.inference_mode()
    def _step(self, active: dict[int, _Sequence], on_tokens: OnTokens, ahead: bool = True) -> list[Completion]:
        """Decode one token per sequence in flight; return the completions of those that end.

        A step that is in flight is read; otherwise one is launched. ahead: whether the next step may be launched before
        this one is read. Raises OutOfMemoryError if fewer slots could help.
        """
        if not active:
            return []
        began = time.perf_counter()
        sequences = list(active.values())
        try:
            step, chosen = self._advance(sequences, ahead)
        except Exception as error:
            self._in_flight = None
            if isinstance(error, torch.OutOfMemoryError) and self._slots > 1:
                raise
            active.clear()
            return [self._fail(sequence.request, sequence.slot, error) for sequence in sequences]
        now = time.perf_counter()
        advanced = [
            (sequence, token_id)
            for sequence, token_id in zip(step.sequences, chosen, strict=True)
            if sequence in sequences
        ]
        for sequence, token_id in advanced:  # the others ended before this step was read
            sequence.new_ids.append(token_id)
        ended = [active.pop(sequence.slot) for sequence, _ in advanced if sequence.finish_reason]
        extra_step = self._in_flight is not None
        completions = [self._finish(sequence, now, extra_step) for sequence in ended]
        if not active:
            self._discard_in_flight()
        # Reading the reports of ended sequences waits for the step in flight, so that time is decode time.
        self.stats.decode_s += (time.perf_counter() if ended and extra_step else now) - began
        self.stats.decode_tokens += len(advanced)
        on_tokens(len(advanced))
        return completions

    def _advance(self, sequences: list[_Sequence], ahead: bool) -> tuple[_Step, list[int]]:
        """Return the step in flight, or a new one, and its tokens; launch the next one first if possible."""
        step = self._in_flight or _Step(sequences, self._launch(sequences))
        self._in_flight = None
        if ahead and self._can_run_ahead(step, sequences):
            handle = self._steps.submit_next()
            self._in_flight = None if handle is None else _Step(step.sequences, handle)
        return step, self._read(step)

    def _discard_in_flight(self) -> None:
        """Wait for the step in flight and discard it, with any error."""
        if self._in_flight is not None:
            with suppress(Exception):
                self._in_flight.handle.read()
        self._in_flight = None

    def _can_run_ahead(self, step: _Step, sequences: list[_Sequence]) -> bool:
        """Return whether the next step can be launched before `step` is read.

        The next step has the same sequences, and its inputs are the greedy tokens of `step`. Requires that no sequence
        joined or left the batch since `step` was launched, that none reaches max_new_tokens with `step`, and that none
        still masks stop ids. A stop id may still end one; its extra step is then discarded. sequences: those in flight.
        """
        return sequences == step.sequences and all(
            sequence.request.min_new_tokens <= len(sequence.new_ids) < sequence.request.max_new_tokens - 1
            for sequence in step.sequences
        )

    def _launch(self, sequences: list[_Sequence]) -> StepHandle:
        newest = [sequence.new_ids[-1] for sequence in sequences]
        positions, slots = [sequence.position for sequence in sequences], [sequence.slot for sequence in sequences]
        return self._steps.launch(torch.tensor([newest, positions, slots]))

    def _read(self, step: _Step) -> list[int]:
        logits, greedy = step.handle.read()
        return self._pick_tokens(
            [sequence.request for sequence in step.sequences],
            [len(sequence.new_ids) for sequence in step.sequences],
            logits,
            greedy,
        )

    def _pick_tokens(
        self, requests: list[Request], produced: list[int], logits: torch.Tensor, greedy: torch.Tensor
    ) -> list[int]:
        """Return the greedy tokens [B] of logits [B, V]; stop ids are masked below a request's min_new_tokens.

        produced: new tokens of each request so far. A token is -1 if the logits are not finite.
        """
        for index, (request, count) in enumerate(zip(requests, produced, strict=True)):
            if count < request.min_new_tokens and greedy[index] >= 0:
                allowed = logits[index].clone()
                allowed[[stop_id for stop_id in request.stop_ids if stop_id < len(allowed)]] = -torch.inf
                greedy[index] = greedy_tokens(allowed)
        chosen: list[int] = greedy.tolist()
        return chosen

    def _finish(self, sequence: _Sequence, now: float, extra_step: bool = False) -> Completion:
        """Return the completion of an ended sequence and free its slot.

        extra_step: whether a step was launched after the one that ended the sequence.
        """
        if sequence.finish_reason == "error":
            self._free(sequence.slot)
            return not_finite_completion(sequence.request, len(sequence.new_ids) - 1)
        cache = self._cache()
        try:
            report = cache.report(sequence.slot, discard_last_step=extra_step)
        except Exception as error:
            return self._fail(sequence.request, sequence.slot, error)
        cache.free_slot(sequence.slot)
        self.stats.record_peak_memory(*self._decoder.devices)
        decode_s = now - sequence.first_token_at
        return Completion(
            sequence.request,
            sequence.new_ids,
            sequence.finish_reason,
            sequence.prefill_s,
            decode_s,
            report,
            shared_prefill_s=sequence.shared_prefill_s,
        )

    def _fail(self, request: Request, slot: int, error: Exception) -> Completion:
        self._free(slot)
        return failed_completion(request, error)

    def _free(self, slot: int) -> None:
        if self._max_tokens:
            synchronize(self._decoder.devices)  # steps launched before the failure may still write to the slot
            self._cache().free_slot(slot)

    def _cache(self) -> ModelCache:
        assert self._decoder.cache is not None, "caches are allocated before a request starts"
        return self._decoder.cache

    def _allocate(self, max_tokens: int, max_new_tokens: int) -> None:
        self._max_tokens = 0
        self._discard_in_flight()
        synchronize(self._decoder.devices)  # a step may still use the old caches, whose host memory is freed at once
        self._steps = EagerSteps(self._decoder)  # frees the graphs of the old caches
        self._decoder.allocate(self._slots, max_tokens, max_new_tokens)

    def _make_steps(self, max_tokens: int, max_new_tokens: int) -> None:
        """Prepare decode steps over the allocated caches."""
        self._steps = make_steps(self._decoder, self._slots)
        self._max_tokens, self._max_new_tokens = max_tokens, max_new_tokens


def free_nbytes(device: torch.device) -> float:
    """Return the bytes of a device's memory that are free for tensors."""
    if device.type != "cuda":
        return math.inf
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _num_tokens(request: Request) -> int:
    return len(request.token_ids) + request.max_new_tokens
