"""The engine over transformers' generate: any architecture, the full cache, one prompt at a time.

Attention and cache are transformers' own, independent of this project's code.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from sparsecache.engine.base import (
    Completion,
    OnTokens,
    Request,
    failed_completion,
    ignore_tokens,
    new_stats,
    not_finite_completion,
)
from sparsecache.engine.general.loading import load_model, reset_dynamic_rope


class TransformersEngine:
    """Greedy generation by transformers: the reference for this project's engines. model: the transformers model."""

    def __init__(self, model: Any, device: torch.device, **generation: Any):
        """model: a transformers model on the device. generation: further fields of its GenerationConfig."""
        self.stats = new_stats(device)
        self.on_logits: Callable[[torch.Tensor], None] | None = None  # receives each step's logits [1, V]
        self.model = model
        self._device, self._generation = device, generation
        # Greedy decoding ignores the sampling settings and penalties of a checkpoint.
        self.model.generation_config = GenerationConfig()

    @classmethod
    def load(
        cls,
        path: Path,
        device: torch.device | Sequence[torch.device],
        dtype: torch.dtype,
        allow_pickle: bool = False,
        config: Any = None,
    ) -> "TransformersEngine":
        """Load a checkpoint to a device, or to several, as `load_model` does. Raises UsageError as it does."""
        devices = [device] if isinstance(device, torch.device) else device
        return cls(load_model(path, devices, dtype, allow_pickle, config), devices[0])

    def reserve(self, max_tokens: int, max_new_tokens: int | None = None) -> None:
        """Do nothing: transformers allocates per prompt."""

    def reset_stats(self) -> None:
        """Set the totals and the peak of GPU memory to zero."""
        self.stats = new_stats(self._device)

    def session(self) -> dict[str, Any]:
        """Return the stats as "clock", their key in run.json."""
        return {"clock": asdict(self.stats)}

    def generate(self, requests: Iterable[Request], on_tokens: OnTokens = ignore_tokens) -> Iterator[Completion]:
        """Yield a completion per request, in order."""
        for request in requests:
            try:
                yield self._generate(request, on_tokens)
            except Exception as error:
                yield failed_completion(request, error)

    @torch.inference_mode()
    def _generate(self, request: Request, on_tokens: OnTokens) -> Completion:
        reset_dynamic_rope(self.model)
        observer = _LogitsObserver(self._device, self.on_logits)
        prompt = torch.tensor([request.token_ids], device=self._device)
        began = time.perf_counter()
        generation = GenerationConfig(
            do_sample=False,
            max_new_tokens=request.max_new_tokens,
            min_new_tokens=request.min_new_tokens or None,
            eos_token_id=list(request.stop_ids) or None,
            pad_token_id=request.stop_ids[0] if request.stop_ids else 0,
            **self._generation,
        )
        try:
            output = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=generation,
                logits_processor=LogitsProcessorList([observer]),
            )
        except _NotFiniteError:
            return not_finite_completion(request, observer.new_tokens)
        new_ids = output[0, prompt.shape[1] :].tolist()
        ended = time.perf_counter()
        prefill_s, decode_s = observer.first_token_at - began, ended - observer.first_token_at
        on_tokens(len(new_ids))
        self._count(len(request.token_ids), prefill_s, len(new_ids) - 1, decode_s)
        stopped = new_ids[-1] in request.stop_ids and len(new_ids) > request.min_new_tokens
        return Completion(request, new_ids, "stop" if stopped else "length", prefill_s, decode_s)

    def _count(self, prompt_tokens: int, prefill_s: float, decode_tokens: int, decode_s: float) -> None:
        self.stats.prefill_tokens += prompt_tokens
        self.stats.prefill_s += prefill_s
        self.stats.decode_tokens += decode_tokens
        self.stats.decode_s += decode_s
        self.stats.record_peak_memory(self._device)


class _NotFiniteError(Exception):
    """Logits that are NaN or infinite."""


class _LogitsObserver(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped here
    """Records the time of the first logits; raises _NotFiniteError for logits that are not finite. Changes none."""

    def __init__(self, device: torch.device, on_logits: Callable[[torch.Tensor], None] | None):
        self.first_token_at = 0.0
        self.new_tokens = -1
        self._device, self._on_logits = device, on_logits

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.new_tokens += 1
        if not scores.max().isfinite():  # this also waits for the device
            raise _NotFiniteError
        if not self.first_token_at:
            self.first_token_at = time.perf_counter()
        if self._on_logits is not None:
            self._on_logits(scores)
        return scores
