"""Greedy generation in slots: prompts are prefilled into free slots and decoded together."""

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
from sparsecache.engine.base import Completion, Request, Tick, failure, fresh_clock, no_tick, not_finite
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.steps import EagerSteps, StepHandle, Steps, TokenReadback, make_steps, most_likely


@dataclass(eq=False)
class _Sequence:
    """A request in flight."""

    request: Request
    slot: int
    new_ids: list[int]
    prefill_s: float
    first_token_at: float

    @property
    def position(self) -> int:
        """Of the newest token, which the next step reads."""
        return len(self.request.token_ids) + len(self.new_ids) - 1

    @property
    def finish_reason(self) -> str:
        if self.new_ids[-1] < 0:
            return "error"
        if self.new_ids[-1] in self.request.stop_ids and len(self.new_ids) > self.request.min_new_tokens:
            return "stop"
        return "length" if len(self.new_ids) >= self.request.max_new_tokens else ""


@dataclass
class _Step:
    """A step under way, and whose."""

    rows: list[_Sequence]
    handle: StepHandle


class _RequestQueue:
    """Waiting requests, which can be looked at before they are taken, and put back."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._rest = iter(requests)
        self._front: list[Request] = []

    def peek(self, place: int = 0) -> Request | None:
        """Return the request at a place; None if there is none."""
        self._front.extend(islice(self._rest, max(0, place + 1 - len(self._front))))
        return self._front[place] if place < len(self._front) else None

    def drop_first(self) -> None:
        """Remove the first request."""
        del self._front[0]

    def put_back(self, requests: Iterable[Request]) -> None:
        """Put requests before all others."""
        self._front[:0] = requests


class Generator:
    """The engine over our own decoder. It draws at most one request more than it can start.

    At most `slots` sequences are in flight, fewer where memory is short. A failed request becomes a completion with an
    error and the others go on; when a step fails, that is every request in flight. Out of memory fails a request only
    when nothing else is in flight; otherwise all of them restart, half as many at once.

    Where possible, a step is launched before the one before it is read, so that the device does not wait for the
    host. A sequence that a stop id ends has then been decoded one step too many; that step is discarded.
    """

    def __init__(self, decoder: Decoder, slots: int):
        self.clock = fresh_clock(*decoder.devices)
        self._decoder = decoder
        self._max_slots = self._slots = slots
        self._max_tokens = self._max_new_tokens = 0  # per slot; 0: nothing is allocated
        self._steps: Steps = EagerSteps(decoder)
        self._in_flight: _Step | None = None  # launched ahead

    @property
    def slots(self) -> int:
        """How many sequences may be in flight at once now."""
        return self._slots

    @torch.inference_mode()
    def reserve(self, max_tokens: int, max_new_tokens: int | None = None) -> None:
        """Allocate for sequences of max_tokens, in as many slots as memory allows.

        max_new_tokens: new tokens among them at most; None: all may be. Without `reserve` each longer request
        allocates anew.
        """
        self._slots = self._max_slots
        while not self._fits(max_tokens, max_new_tokens or max_tokens) and self._slots > 1:
            self._slots = max(1, self._slots * 3 // 4)

    def _fits(self, max_tokens: int, max_new_tokens: int) -> bool:
        """Allocate, and return whether that leaves enough memory for a prompt's pass."""
        try:
            self._allocate(max_tokens, max_new_tokens)
            devices, needed = self._decoder.devices, self._decoder.prompt_nbytes(max_tokens)
            if self._slots > 1 and any(_free_nbytes(device) <= needed for device in devices):
                return False
            self._make_steps(max_tokens, max_new_tokens)
        except torch.OutOfMemoryError:  # a request that is too long fails by itself
            self._max_tokens = 0
            return False
        return True

    def reset_clock(self) -> None:
        """Starts the totals and the peak of GPU memory anew."""
        self.clock = fresh_clock(*self._decoder.devices)

    def session(self) -> dict[str, Any]:
        """The clock."""
        return {"clock": asdict(self.clock)}

    def generate(self, requests: Iterable[Request], tick: Tick = no_tick) -> Iterator[Completion]:
        """Yields a completion for every request, in the order in which they end."""
        queue = _RequestQueue(requests)
        active: dict[int, _Sequence] = {}
        self._drain()  # what an earlier call left, that was cut off
        while active or queue.peek() is not None:
            short_of_memory = False
            try:
                while (upcoming := queue.peek()) is not None and self._can_start(upcoming, active):
                    if self._in_flight is not None:
                        yield from self._step(active, tick, ahead=False)
                        continue
                    started = self._start(upcoming, queue.peek(1), active)
                    queue.drop_first()
                    if started is None or started.error is None:
                        tick(1)
                    if started is not None:
                        yield started
                yield from self._step(active, tick)
            except torch.OutOfMemoryError:
                short_of_memory = True
            if short_of_memory:  # only now, since the error holds the frames, and the frames the tensors
                self._shrink(queue, active)

    def _can_start(self, request: Request, active: dict[int, _Sequence]) -> bool:
        """Whether a slot is free and long enough; caches are allocated anew only when nothing is in flight."""
        return not active or (len(active) < self._slots and self._has_capacity(request))

    def _has_capacity(self, request: Request) -> bool:
        return _num_tokens(request) <= self._max_tokens and request.max_new_tokens <= self._max_new_tokens

    def _shrink(self, queue: _RequestQueue, active: dict[int, _Sequence]) -> None:
        """All in flight start over, half as many at once."""
        before, self._slots = self._slots, self._slots // 2
        print(
            f"Warning: out of memory with up to {before} sequences at a time. Going on with up to {self._slots}.",
            file=sys.stderr,
        )
        queue.put_back([row.request for row in active.values()])
        active.clear()
        self._drain()
        self._max_tokens = 0
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _start(self, request: Request, following: Request | None, active: dict[int, _Sequence]) -> Completion | None:
        """Prefills a request; returns its completion if it ends at once or fails.

        While the device reads it, what the following one needs is made ready. Raises OutOfMemoryError where fewer slots
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
            told = TokenReadback(1, logits.device)
            told.copy(most_likely(logits))
            if following is not None:
                with suppress(Exception):  # a prompt that cannot be read will say so itself
                    self._decoder.warm_attention_plan(len(following.token_ids))
            first = self._choose([request], [0], logits, told.read(1))[0]
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) and self._slots > 1:
                raise
            return self._fail(request, slot, error)
        now = time.perf_counter()
        self.clock.prefill_tokens += len(request.token_ids)
        self.clock.prefill_s += now - began
        sequence = _Sequence(request, slot, [first], now - began, now)
        if sequence.finish_reason:
            return self._finish(sequence, now)
        active[slot] = sequence
        return None

    @torch.inference_mode()
    def _step(self, active: dict[int, _Sequence], tick: Tick, ahead: bool = True) -> list[Completion]:
        """One token for every sequence in flight; returns the completions of those that end.

        What is under way is read, for the sequences that it was launched for. ahead: whether the next step may be
        launched before that. Raises OutOfMemoryError where fewer slots could help.
        """
        if not active:
            return []
        began = time.perf_counter()
        rows = list(active.values())
        try:
            step, chosen = self._advance(rows, ahead)
        except Exception as error:
            self._in_flight = None
            if isinstance(error, torch.OutOfMemoryError) and self._slots > 1:
                raise
            active.clear()
            return [self._fail(row.request, row.slot, error) for row in rows]
        now = time.perf_counter()
        in_flight = [(row, token_id) for row, token_id in zip(step.rows, chosen, strict=True) if row in rows]
        for row, token_id in in_flight:  # the others had ended when this was launched
            row.new_ids.append(token_id)
        ended = [active.pop(row.slot) for row, _ in in_flight if row.finish_reason]
        one_too_many = self._in_flight is not None
        completions = [self._finish(row, now, one_too_many) for row in ended]
        if not active:
            self._drain()
        # With a step under way, what the ended ones tell is waited for until that is done.
        self.clock.decode_s += (time.perf_counter() if ended and one_too_many else now) - began
        self.clock.decode_tokens += len(in_flight)
        tick(len(in_flight))
        return completions

    def _advance(self, rows: list[_Sequence], ahead: bool) -> tuple[_Step, list[int]]:
        """The step that is under way, or one launched now, and what it chose; before that the next one is launched."""
        step = self._in_flight or _Step(rows, self._launch(rows))
        self._in_flight = None
        if ahead and self._continues(step, rows):
            handle = self._steps.submit_next()
            self._in_flight = None if handle is None else _Step(step.rows, handle)
        return step, self._read(step)

    def _drain(self) -> None:
        """Waits for a step that nobody wants any more, whatever becomes of it."""
        if self._in_flight is not None:
            with suppress(Exception):
                self._in_flight.handle.read()
        self._in_flight = None

    def _continues(self, step: _Step, rows: list[_Sequence]) -> bool:
        """Whether the sequences of a step, before it is read, are known to be those of the next one, with its tokens.

        Not if one begins or ends with it, or must not take its most likely token; that a stop id ends one is not known.
        rows: what is in flight now.
        """
        return rows == step.rows and all(
            row.request.min_new_tokens <= len(row.new_ids) < row.request.max_new_tokens - 1 for row in step.rows
        )

    def _launch(self, rows: list[_Sequence]) -> StepHandle:
        newest = [row.new_ids[-1] for row in rows]
        places = [[row.position for row in rows], [row.slot for row in rows]]
        return self._steps.launch(torch.tensor([newest, *places]))

    def _read(self, step: _Step) -> list[int]:
        logits, greedy = step.handle.read()
        return self._choose([row.request for row in step.rows], [len(row.new_ids) for row in step.rows], logits, greedy)

    def _choose(
        self, requests: list[Request], produced: list[int], logits: torch.Tensor, greedy: torch.Tensor
    ) -> list[int]:
        """The `greedy` choice [B] from logits [B, V]; made anew without stop ids for rows below their minimum.

        A choice is -1 where the logits are not finite.
        """
        for row, (request, count) in enumerate(zip(requests, produced, strict=True)):
            if count < request.min_new_tokens and greedy[row] >= 0:
                allowed = logits[row].clone()
                allowed[[stop_id for stop_id in request.stop_ids if stop_id < len(allowed)]] = -torch.inf
                greedy[row] = most_likely(allowed)
        chosen: list[int] = greedy.tolist()
        return chosen

    def _finish(self, row: _Sequence, now: float, one_too_many: bool = False) -> Completion:
        """Return the completion of an ended sequence and free its slot.

        one_too_many: whether a step was launched after the one that ended it.
        """
        if row.finish_reason == "error":
            self._free(row.slot)
            return not_finite(row.request, len(row.new_ids) - 1)
        cache = self._cache()
        try:
            report = cache.report(row.slot, discard_last_step=one_too_many)
        except Exception as error:
            return self._fail(row.request, row.slot, error)
        cache.free_slot(row.slot)
        self.clock.note_memory(*self._decoder.devices)
        decode_s = now - row.first_token_at
        return Completion(row.request, row.new_ids, row.finish_reason, row.prefill_s, decode_s, report)

    def _fail(self, request: Request, slot: int, error: Exception) -> Completion:
        self._free(slot)
        return failure(request, error)

    def _free(self, slot: int) -> None:
        if self._max_tokens:
            self._synchronize()  # what was launched before the failure may still write to the slot
            self._cache().free_slot(slot)

    def _cache(self) -> ModelCache:
        assert self._decoder.cache is not None, "caches are allocated before a request starts"
        return self._decoder.cache

    def _allocate(self, max_tokens: int, max_new_tokens: int) -> None:
        self._max_tokens = 0
        self._drain()
        self._synchronize()  # a step may still use the old caches, whose host memory is freed at once
        self._steps = EagerSteps(self._decoder)  # frees the graphs of the old caches
        self._decoder.allocate(self._slots, max_tokens, max_new_tokens)

    def _synchronize(self) -> None:
        """Wait until the devices have done all that was launched."""
        for device in self._decoder.devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def _make_steps(self, max_tokens: int, max_new_tokens: int) -> None:
        """Make steps over the allocated caches."""
        self._steps = make_steps(self._decoder, self._slots)
        self._max_tokens, self._max_new_tokens = max_tokens, max_new_tokens


def _free_nbytes(device: torch.device) -> float:
    """Return the bytes that tensors can still take on a device."""
    if device.type != "cuda":
        return math.inf
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _num_tokens(request: Request) -> int:
    return len(request.token_ids) + request.max_new_tokens
