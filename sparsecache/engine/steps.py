"""Decode steps: as CUDA graphs where the decoder allows it, else call by call."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sparsecache.engine.decoder import Decoder


class Flight(Protocol):
    """A step under way."""

    def read(self) -> tuple[Tensor, Tensor]:
        """Waits for the logits [B, V] and the most likely tokens [B], as `most_likely` gives them.

        The logits stand until the step after it is launched; the tokens, on the CPU or the device, are the caller's.
        """


class Steps(Protocol):
    """Decode steps, each of which is launched and then read."""

    def launch(self, inputs: Tensor) -> Flight:
        """A step from token ids, positions and slots: [3, B] on the CPU."""

    def go_on(self) -> Flight | None:
        """The step after the latest one, of the same sequences, from the tokens that it finds most likely.

        It is launched before that one is read. None where it cannot be: nothing has happened then.
        """


def most_likely(logits: Tensor) -> Tensor:
    """The most likely token of each row of logits [..., V]; -1 where NaN or infinity makes it meaningless.

    As an index of the embedding -1 is harmless, so a step that was launched ahead may read it.
    """
    best, token_ids = logits.max(dim=-1)  # NaN counts as the largest
    return torch.where(best.isfinite(), token_ids, -1)


def make_steps(decoder: Decoder, slots: int) -> Steps:
    """Steps of up to `slots` sequences. The method must have room for them, and nothing in flight."""
    return GraphedSteps(decoder, slots) if decoder.graphable else EagerSteps(decoder)


class Launched(NamedTuple):
    """A step whose operations are launched one by one: what is read waits for itself."""

    logits: Tensor
    greedy: Tensor

    def read(self) -> tuple[Tensor, Tensor]:
        """As Flight.read."""
        return self


class EagerSteps:
    """Every step is launched operation by operation."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def launch(self, inputs: Tensor) -> Launched:
        """As Steps.launch."""
        logits = self._decoder.step(*inputs.to(self._decoder.device))
        return Launched(logits, most_likely(logits))

    def go_on(self) -> None:
        """Never: with so many launches the host has no time to be ahead of the device."""


class HostTokens:
    """Tokens on their way to the host."""

    def __init__(self, size: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._tokens = torch.empty(size, dtype=torch.int64, pin_memory=on_gpu)
        self._event: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    def copy(self, tokens: Tensor) -> None:
        """Begins to copy tokens, after all that is on the current stream by now."""
        self._tokens.copy_(tokens, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(tokens.device))

    def read(self, rows: int) -> Tensor:
        """Waits for the first `rows` of them: a copy."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens[:rows].clone()


@dataclass(eq=False)
class _Graph:
    """A captured step of some batch size.

    inputs [3, size], on the device, are those of the next step once the graph has run: what was most likely, one
    position on. told: where that choice is told, of one step and, by turns, of the next. latest: the places of the
    step that it ran last; left: the inputs as that one leaves them, where the host knows them.
    """

    graph: Any
    inputs: Tensor
    logits: Tensor
    told: tuple[HostTokens, HostTokens]
    latest: Tensor | None = None
    left: Tensor | None = None


@dataclass(eq=False)
class _Replay:
    """A step of a graph's. places: positions and slots, [2, B]."""

    graph: _Graph
    told: HostTokens
    places: Tensor

    def read(self) -> tuple[Tensor, Tensor]:
        """As Flight.read."""
        rows = self.places.shape[1]
        greedy = self.told.read(rows)
        if self.graph.latest is self.places:
            self.graph.left = torch.stack((greedy, self.places[0] + 1, self.places[1]))
        return self.graph.logits[:rows], greedy


class GraphedSteps:
    """One CUDA graph for each batch size among 1, 2, 4 and so on, and `slots`; good for any length.

    A smaller batch is filled up with slots that are not in flight, which the method's seam allows.
    """

    def __init__(self, decoder: Decoder, slots: int) -> None:
        self._decoder, self._slots = decoder, slots
        self._eager = EagerSteps(decoder)
        self._latest: _Graph | None = None
        sizes = sorted({*(2**power for power in range(slots.bit_length())), slots}, reverse=True)
        self._graphs: dict[int, _Graph] = {}
        for size in sizes:  # the largest first: the others fit into its memory
            self._graphs[size] = self._capture(size)

    def launch(self, inputs: Tensor) -> Flight:
        """As Steps.launch."""
        rows = inputs.shape[1]
        graph = self._graphs[min(size for size in self._graphs if size >= rows)]
        left, graph.left = graph.left, None  # not known while the graph runs, should that be cut off
        if left is None or not torch.equal(left, inputs):
            graph.inputs.copy_(self._filled_up(inputs, graph.inputs.shape[1]))
        return self._replay(graph, inputs[1:])

    def go_on(self) -> Flight | None:
        """As Steps.go_on."""
        graph = self._latest
        if graph is None or graph.latest is None:
            return None
        positions, slots = graph.latest
        graph.left = None
        return self._replay(graph, torch.stack((positions + 1, slots)))

    def _replay(self, graph: _Graph, places: Tensor) -> "_Replay":
        told, other = graph.told
        graph.told = other, told
        graph.graph.replay()
        told.copy(graph.inputs[0])
        self._latest, graph.latest = graph, places
        return _Replay(graph, told, places)

    def _filled_up(self, inputs: Tensor, size: int) -> Tensor:
        """inputs [3, B] to [3, size]: the first token at position 0 in idle slots, which then go on by themselves."""
        taken = set(inputs[2].tolist())
        idle = [slot for slot in range(self._slots) if slot not in taken][: size - inputs.shape[1]]
        more = torch.tensor([[0] * len(idle), [0] * len(idle), idle], dtype=inputs.dtype)
        return torch.cat((inputs, more), dim=1)

    def _capture(self, size: int) -> _Graph:
        idle = torch.zeros(3, size, dtype=torch.int64)
        idle[2] = torch.arange(size)
        stream: Any = torch.cuda.Stream(self._decoder.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._decoder.device))
        with torch.cuda.stream(stream):  # compiles kernels, and makes what libraries make at their first call
            self._eager.launch(idle)
        torch.cuda.current_stream(self._decoder.device).wait_stream(stream)
        inputs = idle.to(self._decoder.device)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            logits = self._run(inputs)
        return _Graph(graph, inputs, logits, (HostTokens(size, inputs.device), HostTokens(size, inputs.device)))

    def _run(self, inputs: Tensor) -> Tensor:
        """One step, which leaves in `inputs` those of the next; logits [size, V]."""
        logits = self._decoder.step(*inputs)
        inputs[0] = most_likely(logits)
        inputs[1] += 1
        return logits
