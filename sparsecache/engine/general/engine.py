"""The general engine: any model of transformers with any cache method."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from sparsecache.engine.base import Completion, OnTokens, Request, ignore_tokens
from sparsecache.engine.general.model import CachedModel
from sparsecache.engine.generator import Generator


class GeneralEngine(Generator):
    """Continuous batching over a CachedModel; one sequence at a time where the model allows no more."""

    def __init__(self, model: CachedModel, slots: int) -> None:
        super().__init__(model, slots if model.one_slot_reason is None else 1)
        self.model = model

    @property
    def on_logits(self) -> Callable[[torch.Tensor], None] | None:
        """The receiver of the logits [B, V] of each prefill and step."""
        return self.model.on_logits

    @on_logits.setter
    def on_logits(self, receive: Callable[[torch.Tensor], None]) -> None:
        self.model.on_logits = receive

    def generate(self, requests: Iterable[Request], on_tokens: OnTokens = ignore_tokens) -> Iterator[Completion]:
        """Yield a completion per request, in the order in which they end.

        A report says how many layers the caches serve, if not all.
        """
        served, layers = self.model.shape.layers, self.model.num_layers
        more = {"full_attention_layers": served} if served < layers else {}
        for completion in super().generate(requests, on_tokens):
            yield completion if completion.error else replace(completion, report={**completion.report, **more})

    def session(self) -> dict[str, Any]:
        """Return the stats, and how many layers the method's caches serve."""
        layers = {"full_attention_layers": self.model.shape.layers, "layers": self.model.num_layers}
        return {**super().session(), **layers}
