"""The training plan, and worker processes that turn lessons into batches for the current stage of it."""

import multiprocessing
import queue
import random
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from lesson_tokenizer import Encoder
from lessons import MIX, PADDING, lesson
from tiny_llama import Size

DATASETS = tuple(MIX)
_PAD_ID = 2


@dataclass(frozen=True)
class Stage:
    """A part of training, from `start` (share of the training time) to the next stage.

    `lengths` maps sequence lengths in tokens to their probabilities. `penalised`: the loss includes the attention
    entropy.
    """

    start: float
    lengths: dict[int, float]
    penalised: bool = False


STAGES = (
    Stage(0.00, {256: 0.3, 512: 0.7}),
    Stage(0.08, {512: 0.4, 1024: 0.6}),
    Stage(0.20, {512: 0.2, 1024: 0.2, 2048: 0.6}),
    Stage(0.38, {512: 0.15, 1024: 0.1, 2048: 0.15, 4096: 0.6}),
    Stage(0.58, {1024: 0.15, 2048: 0.15, 4096: 0.3, 8192: 0.4}),
    Stage(0.70, {1024: 0.1, 2048: 0.15, 4096: 0.35, 8192: 0.2, 9728: 0.2}, penalised=True),
)
TINY_STAGES = (Stage(0.0, {256: 1.0}), Stage(0.7, {256: 0.5, 512: 0.5}, penalised=True))


@dataclass(frozen=True)
class Plan:
    """The hyperparameters, which are the same for all runs of one training.

    `entropy` is the weight of the attention entropy, `ordinary_weight` the loss weight of tokens that the text does
    not determine. Learning rates are scaled by `rate`.
    """

    size: Size
    stages: tuple[Stage, ...]
    batch_tokens: int
    entropy: float
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    weight_decay: float = 0.05
    ordinary_weight: float = 0.15
    warm_up: float = 0.02
    decay_from: float = 0.45

    def stage(self, share: float) -> int:
        """The index of the stage at this share of the training time."""
        return max(index for index, stage in enumerate(self.stages) if share >= stage.start)

    def rate(self, share: float) -> float:
        """The learning-rate factor: linear warm-up, constant, linear decay to 0."""
        if share < self.warm_up:
            return (share + 1e-4) / self.warm_up
        return min(1.0, max(0.0, (1 - share) / (1 - self.decay_from)))


@dataclass
class Batch:
    """ids [B, S], flags [B, S] and the dataset of each row as an index into DATASETS, [B]."""

    ids: Tensor
    flags: Tensor
    kinds: Tensor


class BatchLoader:
    """Worker processes that make batches, and a thread that collects them in pinned memory."""

    def __init__(self, plan: Plan, tokenizer: Path, workers: int, seed: int, device: torch.device):
        context = multiprocessing.get_context("fork")
        self._stage = context.Value("i", 0)
        self._made: Any = context.Queue(maxsize=max(3, workers // 2))
        self._ready: queue.Queue[Batch] = queue.Queue(maxsize=4)
        self._device = device
        self._processes = [
            context.Process(
                target=_make_batches, args=(plan, tokenizer, f"{seed}/{index}", self._stage, self._made), daemon=True
            )
            for index in range(workers)
        ]
        for process in self._processes:
            process.start()
        threading.Thread(target=self._collect, daemon=True).start()

    def next(self, stage: int) -> Batch:
        """The next batch. The workers make later batches for `stage`."""
        self._stage.value = stage
        return self._ready.get()

    def close(self) -> None:
        """Stop the worker processes."""
        for process in self._processes:
            process.kill()

    def _collect(self) -> None:
        while True:
            tensors = [torch.from_numpy(array) for array in self._made.get()]
            self._ready.put(
                Batch(*(tensor.pin_memory() if self._device.type == "cuda" else tensor for tensor in tensors))
            )


def _make_batches(plan: Plan, tokenizer: Path, seed: str, stage: Any, made: Any) -> None:
    torch.set_num_threads(1)
    encode = Encoder(tokenizer)
    rng = random.Random(f"lessons/{seed}")
    weights = list(MIX.values())
    number = 0
    while True:
        lengths = plan.stages[stage.value].lengths
        length = rng.choices(list(lengths), list(lengths.values()))[0]
        rows = max(1, plan.batch_tokens // length)
        ids = numpy.full((rows, length), _PAD_ID, numpy.int32)
        flags = numpy.full((rows, length), PADDING, numpy.uint8)
        kinds = rng.choices(range(len(DATASETS)), weights, k=rows)
        for row, kind in enumerate(kinds):
            number += 1
            row_ids, row_flags = lesson(DATASETS[kind], length, f"{seed}/{number}", encode)
            ids[row, : len(row_ids)], flags[row, : len(row_ids)] = row_ids, row_flags
        made.put((ids, flags, numpy.array(kinds)))
