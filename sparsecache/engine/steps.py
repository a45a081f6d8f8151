"""Decode steps: captured as CUDA graphs where the decoder allows it, else launched operation by operation."""

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sparsecache.engine.base import SlotDecoder

_BLOCKS = 256  # blocks of a row of logits


class StepHandle(Protocol):
    """A step in flight."""

    def read(self) -> tuple[Tensor, Tensor]:
        """Wait for the logits [B, V] and their greedy tokens [B], as `greedy_tokens` returns them.

        The logits are valid until the next step is launched; the tokens, on the CPU or the device, are the caller's.
        """


class Steps(Protocol):
    """Decode steps, each of which is launched and then read."""

    def launch(self, inputs: Tensor) -> StepHandle:
        """Launch a step from token ids, positions and slots: [3, B] on the CPU."""

    def submit_next(self) -> StepHandle | None:
        """Launch the step after the latest one, before that is read: same sequences, its greedy tokens.

        Returns None, and does nothing, if that is not possible.
        """


def greedy_tokens(logits: Tensor) -> Tensor:
    """Return the most likely token per row of logits [..., V]; -1 where the largest is NaN or infinite.

    -1 is a valid index of the embedding, so a step that was launched ahead may read it.
    """
    blocks = math.gcd(logits.shape[-1], _BLOCKS) if logits.device.type == "cuda" else 1  # a GPU program per block
    best, token_ids = blocked_max(logits, blocks)
    return torch.where(best.abs() < torch.inf, token_ids, -1)


def blocked_max(logits: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Return the largest of logits [..., V], NaN above all, and its first index; `blocks` divides V."""
    block_best, index_in_block = logits.view(*logits.shape[:-1], blocks, -1).max(dim=-1)
    best, block = block_best.max(dim=-1, keepdim=True)
    token_ids = block * (logits.shape[-1] // blocks) + index_in_block.gather(-1, block)
    return best[..., 0], token_ids[..., 0]


def make_steps(decoder: SlotDecoder, slots: int) -> Steps:
    """Return steps of up to `slots` sequences. The decoder's caches must be allocated for them, all slots free."""
    return GraphedSteps(decoder, slots) if decoder.graphable else EagerSteps(decoder)


class EagerStep(NamedTuple):
    """A step that was launched operation by operation."""

    logits: Tensor
    greedy: Tensor

    def read(self) -> tuple[Tensor, Tensor]:
        """As StepHandle.read."""
        return self


class EagerSteps:
    """Launches every step operation by operation."""

    def __init__(self, decoder: SlotDecoder) -> None:
        self._decoder = decoder

    def launch(self, inputs: Tensor) -> EagerStep:
        """As Steps.launch."""
        logits = self._decoder.step(*inputs.to(self._decoder.device))
        return EagerStep(logits, greedy_tokens(logits))

    def submit_next(self) -> None:
        """Return None: launching so many operations takes the host as long as the device."""


class TokenReadback:
    """Tokens that are being copied to the host."""

    def __init__(self, size: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._tokens = torch.empty(size, dtype=torch.int64, pin_memory=on_gpu)
        self._event: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    def copy(self, tokens: Tensor) -> None:
        """Start to copy tokens, after all work on the current stream."""
        self._tokens.copy_(tokens, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(tokens.device))

    def read(self, rows: int) -> Tensor:
        """Wait for the copy and return the first `rows` tokens."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens[:rows].clone()


@dataclass(eq=False)
class _Graph:
    """The captured step of one batch size.

    inputs: [3, size] on the device: token ids, positions, slots. A replay overwrites them with the inputs of the next
    step: its greedy tokens, at the next positions. readbacks: host copies of the tokens, for alternate steps.
    latest: positions and slots [2, B] of the latest replay. next_inputs: `inputs` after it, None if the host has not
    read them.
    """

    graph: Any
    inputs: Tensor
    logits: Tensor
    readbacks: tuple[TokenReadback, TokenReadback]
    latest: Tensor | None = None
    next_inputs: Tensor | None = None


@dataclass(eq=False)
class _Replay:
    """A replayed step. positions_and_slots: its positions and slots, [2, B]."""

    graph: _Graph
    readback: TokenReadback
    positions_and_slots: Tensor

    def read(self) -> tuple[Tensor, Tensor]:
        """As StepHandle.read."""
        rows = self.positions_and_slots.shape[1]
        greedy = self.readback.read(rows)
        if self.graph.latest is self.positions_and_slots:
            self.graph.next_inputs = torch.stack((greedy, self.positions_and_slots[0] + 1, self.positions_and_slots[1]))
        return self.graph.logits[:rows], greedy


class GraphedSteps:
    """One CUDA graph per batch size 1, 2, 4, ... and `slots`. A graph serves any sequence length.

    A smaller batch is padded with free slots, which a LayerCache must allow.
    """

    def __init__(self, decoder: SlotDecoder, slots: int) -> None:
        self._decoder, self._slots = decoder, slots
        self._eager = EagerSteps(decoder)
        self._latest: _Graph | None = None
        sizes = sorted({*(2**power for power in range(slots.bit_length())), slots}, reverse=True)
        self._graphs: dict[int, _Graph] = {}
        for size in sizes:  # the largest first: the others reuse its memory
            self._graphs[size] = self._capture(size)

    def launch(self, inputs: Tensor) -> StepHandle:
        """As Steps.launch."""
        rows = inputs.shape[1]
        graph = self._graphs[min(size for size in self._graphs if size >= rows)]
        known, graph.next_inputs = graph.next_inputs, None  # unknown until read, also if the replay is interrupted
        if known is None or not torch.equal(known, inputs):
            graph.inputs.copy_(self._padded(inputs, graph.inputs.shape[1]))
        return self._replay(graph, inputs[1:])

    def submit_next(self) -> StepHandle | None:
        """As Steps.submit_next."""
        graph = self._latest
        if graph is None or graph.latest is None:
            return None
        positions, slots = graph.latest
        graph.next_inputs = None
        return self._replay(graph, torch.stack((positions + 1, slots)))

    def _replay(self, graph: _Graph, positions_and_slots: Tensor) -> _Replay:
        readback, other = graph.readbacks
        graph.readbacks = other, readback
        graph.graph.replay()
        readback.copy(graph.inputs[0])
        self._latest, graph.latest = graph, positions_and_slots
        return _Replay(graph, readback, positions_and_slots)

    def _padded(self, inputs: Tensor, size: int) -> Tensor:
        """Pad inputs [3, B] to [3, size]: token 0 at position 0 in free slots."""
        used = set(inputs[2].tolist())
        free = [slot for slot in range(self._slots) if slot not in used][: size - inputs.shape[1]]
        more = torch.tensor([[0] * len(free), [0] * len(free), free], dtype=inputs.dtype)
        return torch.cat((inputs, more), dim=1)

    def _capture(self, size: int) -> _Graph:
        free = torch.zeros(3, size, dtype=torch.int64)
        free[2] = torch.arange(size)
        stream: Any = torch.cuda.Stream(self._decoder.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._decoder.device))
        with torch.cuda.stream(stream):  # compiles kernels and initialises libraries
            self._eager.launch(free)
        torch.cuda.current_stream(self._decoder.device).wait_stream(stream)
        inputs = free.to(self._decoder.device)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
        with _raise_out_of_memory(), _no_garbage_collection(), torch.cuda.graph(graph, pool=pool):
            logits = self._run(inputs)
        return _Graph(graph, inputs, logits, (TokenReadback(size, inputs.device), TokenReadback(size, inputs.device)))

    def _run(self, inputs: Tensor) -> Tensor:
        """Run one step and overwrite `inputs` with those of the next; return logits [size, V]."""
        logits = self._decoder.step(*inputs)
        inputs[0] = greedy_tokens(logits)
        inputs[1] += 1
        return logits


@contextmanager
def _raise_out_of_memory() -> Iterator[None]:
    """Turn a CUDA error that lack of memory caused into OutOfMemoryError.

    The engine then tries fewer slots. CUDA, not torch, allocates the memory of a graph. A step that runs out of memory
    may also make the end of its capture fail.
    """
    try:
        yield
    except torch.AcceleratorError as error:
        if "out of memory" not in str(error) and not isinstance(error.__context__, torch.OutOfMemoryError):
            raise
        raise torch.OutOfMemoryError("CUDA out of memory while a decode step was captured.") from error


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disable garbage collection: freeing an earlier engine's pinned memory would make a capture fail."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
