"""Decode steps: as CUDA graphs where the decoder allows it, else call by call."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsecache.engine.decoder import Decoder

Steps = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From token ids, positions and slots, [3, B] on the CPU, to logits [B, V] and the most likely tokens [B].

The logits stand until the next step; the tokens, on the CPU or the device, are the caller's.
"""


def make_steps(decoder: Decoder, slots: int) -> Steps:
    """Steps of up to `slots` sequences. The method must have room for them, and nothing in flight."""
    return GraphedSteps(decoder, slots) if decoder.graphable else EagerSteps(decoder)


class EagerSteps:
    """Every step is launched operation by operation."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._decoder.step(*inputs.to(self._decoder.device))
        return logits, logits.argmax(dim=-1)


@dataclass
class _Graph:
    """A captured step of some batch size.

    inputs [3, size], on the device, are those of the next step once the graph has run: what was most likely, one
    position on. greedy [size] is that choice in pinned memory. `left` are the inputs as they then stand, where the host
    knows them.
    """

    graph: Any
    inputs: Tensor
    logits: Tensor
    greedy: Tensor
    left: Tensor | None = None


class GraphedSteps:
    """One CUDA graph for each batch size among 1, 2, 4 and so on, and `slots`; good for any length.

    A smaller batch is filled up with slots that are not in flight, which the method's seam allows.
    """

    def __init__(self, decoder: Decoder, slots: int) -> None:
        self._decoder, self._slots = decoder, slots
        self._eager = EagerSteps(decoder)
        sizes = sorted({*(2**power for power in range(slots.bit_length())), slots}, reverse=True)
        self._graphs: dict[int, _Graph] = {}
        for size in sizes:  # the largest first: the others fit into its memory
            self._graphs[size] = self._capture(size)

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        rows = inputs.shape[1]
        captured = self._graphs[min(size for size in self._graphs if size >= rows)]
        left, captured.left = captured.left, None  # not known while the graph runs, should that be cut off
        if left is None or not torch.equal(left, inputs):
            captured.inputs.copy_(self._filled_up(inputs, captured.inputs.shape[1]))
        captured.graph.replay()
        self._wait()
        greedy = captured.greedy[:rows]
        captured.left = torch.stack((greedy, inputs[1] + 1, inputs[2]))
        return captured.logits[:rows], greedy.clone()

    def _wait(self) -> None:
        torch.cuda.current_stream(self._decoder.device).synchronize()

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
            self._eager(idle)
        torch.cuda.current_stream(self._decoder.device).wait_stream(stream)
        inputs, greedy = idle.to(self._decoder.device), torch.empty(size, dtype=torch.int64, pin_memory=True)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            logits = self._run(inputs, greedy)
        return _Graph(graph, inputs, logits, greedy)

    def _run(self, inputs: Tensor, greedy: Tensor) -> Tensor:
        """One step, which leaves in `inputs` those of the next, and its choice in `greedy`; logits [size, V]."""
        logits = self._decoder.step(*inputs)
        inputs[0] = logits.argmax(dim=-1)
        inputs[1] += 1
        greedy.copy_(inputs[0], non_blocking=True)
        return logits
