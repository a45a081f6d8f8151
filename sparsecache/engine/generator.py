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

from sparsecache.engine.base import Completion, Request, Tick, failure, fresh_clock, no_tick, not_finite
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.steps import EagerSteps, Flight, HostTokens, Steps, make_steps, most_likely
from sparsecache.methods.base import Method


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
    flight: Flight


class _Queue:
    """Requests that wait: they can be looked at before they are taken, and some may come back."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._rest = iter(requests)
        self._back: list[Request] = []

    def peek(self, place: int = 0) -> Request | None:
        """The request with so many before it; None if there is none."""
        self._back.extend(islice(self._rest, max(0, place + 1 - len(self._back))))
        return self._back[place] if place < len(self._back) else None

    def drop_first(self) -> None:
        """The first is done with."""
        del self._back[0]

    def put_back(self, requests: Iterable[Request]) -> None:
        """These come before all others."""
        self._back[:0] = requests


class Generator:
    """The engine over our own decoder. It draws one request more than it can begin.

    `slots` sequences at most are in flight at once: fewer where memory does not suffice. A request that fails comes
    back as a completion with an error, and the others go on; when a step fails, that is every request in flight.
    Out of memory is a failure only when nothing else is in flight; else all of them start over, half as many at once.

    Where steps can go on by themselves, a step is launched before the one before it is read, so that the device does
    not wait for the host. A sequence that a stop id ends has then been decoded one step too far, which is retracted.
    """

    def __init__(self, decoder: Decoder, method: Method, slots: int):
        self.clock = fresh_clock(*decoder.devices)
        self._decoder = decoder
        self._method = method
        self._most_slots = self._slots = slots
        self._room = 0  # tokens that each slot can take
        self._steps: Steps = EagerSteps(decoder)
        self._under_way: _Step | None = None  # launched ahead

    @property
    def slots(self) -> int:
        """How many sequences may be in flight at once by now."""
        return self._slots

    @torch.inference_mode()
    def reserve(self, max_tokens: int) -> None:
        """Makes room for sequences of max_tokens, in as many slots as memory allows.

        Without it room is made for each longer request in turn.
        """
        self._slots = self._most_slots
        while not self._fits(max_tokens) and self._slots > 1:
            self._slots = max(1, self._slots * 3 // 4)

    def _fits(self, max_tokens: int) -> bool:
        """Makes room, and says whether it leaves enough for a prompt to pass."""
        try:
            self._allocate(max_tokens)
            devices, needed = self._decoder.devices, self._decoder.prompt_nbytes(max_tokens)
            if self._slots > 1 and any(_unused(device) <= needed for device in devices):
                return False
            self._prepare(max_tokens)
        except torch.OutOfMemoryError:  # a request that is too long will say so itself
            self._room = 0
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
        queue = _Queue(requests)
        active: dict[int, _Sequence] = {}
        self._drain()  # what an earlier call left, that was cut off
        while active or queue.peek() is not None:
            short_of_memory = False
            try:
                while (upcoming := queue.peek()) is not None and self._can_start(upcoming, active):
                    if self._under_way is not None:
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
        """A free slot with room; room is made anew only when nothing is in flight."""
        return not active or (len(active) < self._slots and _needed(request) <= self._room)

    def _shrink(self, queue: _Queue, active: dict[int, _Sequence]) -> None:
        """All in flight start over, half as many at once."""
        before, self._slots = self._slots, self._slots // 2
        print(
            f"Warning: out of memory with up to {before} sequences at a time. Going on with up to {self._slots}.",
            file=sys.stderr,
        )
        queue.put_back([row.request for row in active.values()])
        active.clear()
        self._drain()
        self._room = 0
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
            if _needed(request) > self._room:
                self._allocate(_needed(request))
                self._prepare(_needed(request))
            began = time.perf_counter()
            token_ids = torch.tensor(request.token_ids, device=self._decoder.device)
            logits = self._decoder.prefill(token_ids, slot, request.max_new_tokens)[None]
            told = HostTokens(1, logits.device)
            told.copy(most_likely(logits))
            if following is not None:
                with suppress(Exception):  # a prompt that cannot be read will say so itself
                    self._decoder.expect(len(following.token_ids))
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
            self._under_way = None
            if isinstance(error, torch.OutOfMemoryError) and self._slots > 1:
                raise
            active.clear()
            return [self._fail(row.request, row.slot, error) for row in rows]
        now = time.perf_counter()
        in_flight = [(row, token_id) for row, token_id in zip(step.rows, chosen, strict=True) if row in rows]
        for row, token_id in in_flight:  # the others had ended when this was launched
            row.new_ids.append(token_id)
        ended = [active.pop(row.slot) for row, _ in in_flight if row.finish_reason]
        too_far = self._under_way is not None
        completions = [self._finish(row, now, too_far) for row in ended]
        if not active:
            self._drain()
        # With a step under way, what the ended ones tell is waited for until that is done.
        self.clock.decode_s += (time.perf_counter() if ended and too_far else now) - began
        self.clock.decode_tokens += len(in_flight)
        tick(len(in_flight))
        return completions

    def _advance(self, rows: list[_Sequence], ahead: bool) -> tuple[_Step, list[int]]:
        """The step that is under way, or one launched now, and what it chose; before that the next one is launched."""
        step = self._under_way or _Step(rows, self._launch(rows))
        self._under_way = None
        if ahead and self._goes_on(step, rows):
            flight = self._steps.go_on()
            self._under_way = None if flight is None else _Step(step.rows, flight)
        return step, self._read(step)

    def _drain(self) -> None:
        """Waits for a step that nobody wants any more, whatever becomes of it."""
        if self._under_way is not None:
            with suppress(Exception):
                self._under_way.flight.read()
        self._under_way = None

    def _goes_on(self, step: _Step, rows: list[_Sequence]) -> bool:
        """Whether the sequences of a step, before it is read, are known to be those of the next one, with its tokens.

        Not if one begins or ends with it, or must not take its most likely token; that a stop id ends one is not known.
        rows: what is in flight now.
        """
        return rows == step.rows and all(
            row.request.min_new_tokens <= len(row.new_ids) < row.request.max_new_tokens - 1 for row in step.rows
        )

    def _launch(self, rows: list[_Sequence]) -> Flight:
        newest = [row.new_ids[-1] for row in rows]
        places = [[row.position for row in rows], [row.slot for row in rows]]
        return self._steps.launch(torch.tensor([newest, *places]))

    def _read(self, step: _Step) -> list[int]:
        logits, greedy = step.flight.read()
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

    def _finish(self, row: _Sequence, now: float, too_far: bool = False) -> Completion:
        """too_far: whether a step was launched after the one that ended the sequence."""
        if row.finish_reason == "error":
            self._free(row.slot)
            return not_finite(row.request, len(row.new_ids) - 1)
        try:
            if too_far:
                self._method.retract(row.slot)
            report = self._method.report(row.slot)
        except Exception as error:
            return self._fail(row.request, row.slot, error)
        self._method.release(row.slot)
        self.clock.note_memory(*self._decoder.devices)
        decode_s = now - row.first_token_at
        return Completion(row.request, row.new_ids, row.finish_reason, row.prefill_s, decode_s, report)

    def _fail(self, request: Request, slot: int, error: Exception) -> Completion:
        self._free(slot)
        return failure(request, error)

    def _free(self, slot: int) -> None:
        if self._room:
            self._settle()  # what was launched before the failure may still write to the slot
            self._method.release(slot)

    def _allocate(self, max_tokens: int) -> None:
        self._room = 0
        self._drain()
        self._settle()  # a step may still be in the room, of which host memory is freed at once
        shape, device, dtype = self._decoder.shape, self._decoder.device, self._decoder.dtype
        self._steps = EagerSteps(self._decoder)  # frees graphs of the old room
        self._method.allocate(shape, self._slots, max_tokens, device, dtype)

    def _settle(self) -> None:
        """Waits until the devices have done all that was launched."""
        for device in self._decoder.devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def _prepare(self, max_tokens: int) -> None:
        """Makes steps over the room there is."""
        self._steps = make_steps(self._decoder, self._slots)
        self._room = max_tokens


def _unused(device: torch.device) -> float:
    """Bytes that tensors can still take on a device."""
    if device.type != "cuda":
        return math.inf
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _needed(request: Request) -> int:
    return len(request.token_ids) + request.max_new_tokens
