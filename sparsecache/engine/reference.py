"""The same job through transformers' own generate: any architecture, one prompt at a time, vanilla only."""

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
)

from sparsecache.engine.base import Completion, Request, Tick, failure, fresh_clock, no_tick, not_finite
from sparsecache.engine.gguf_file import alone
from sparsecache.errors import UsageError


class TransformersEngine:
    """Greedy generation by transformers, as the reference for ours."""

    def __init__(self, model: Any, device: torch.device, **generation: Any):
        """`model` is a transformers model on the device; `generation`, more fields of its GenerationConfig."""
        self.clock = fresh_clock(device)
        self.on_logits: Callable[[torch.Tensor], None] | None = None  # called with each step's logits [1, V]
        self._model, self._device, self._generation = model, device, generation
        # A checkpoint's own sampling and penalties are not part of greedy decoding.
        self._model.generation_config = GenerationConfig()

    @classmethod
    def load(
        cls, path: Path, device: torch.device, dtype: torch.dtype, allow_pickle: bool = False, config: Any = None
    ) -> "TransformersEngine":
        """Loads the checkpoint, with `config` in place of its own configuration if there is one.

        Raises UsageError if transformers cannot without running code from it, or would make up missing weights.
        """
        options = {"config": config, "dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
        try:
            if path.suffix == ".gguf":
                model, told = _load_gguf(path, options)
            else:
                config = _with_default_attention(config or AutoConfig.from_pretrained(path, trust_remote_code=False))
                use_safetensors = None if allow_pickle else True
                model, told = AutoModelForCausalLM.from_pretrained(
                    path, use_safetensors=use_safetensors, **{**options, "config": config}
                )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # another shape, a broken file, an architecture that generates no text
            raise UsageError(f"transformers cannot load {path}: {' '.join(str(error).split())}") from error
        if told["missing_keys"]:
            raise UsageError(
                f"{path} does not fit its config.json: it lacks {', '.join(sorted(told['missing_keys']))}."
            )
        return cls(model.to(device).eval(), device)

    def reserve(self, max_tokens: int, max_new_tokens: int | None = None) -> None:
        """Do nothing: transformers allocates per prompt."""

    def reset_clock(self) -> None:
        """Starts the totals and the peak of GPU memory anew."""
        self.clock = fresh_clock(self._device)

    def session(self) -> dict[str, Any]:
        """The clock."""
        return {"clock": asdict(self.clock)}

    def generate(self, requests: Iterable[Request], tick: Tick = no_tick) -> Iterator[Completion]:
        """Yields a completion for every request, in order."""
        for request in requests:
            try:
                yield self._generate(request, tick)
            except Exception as error:
                yield failure(request, error)

    @torch.inference_mode()
    def _generate(self, request: Request, tick: Tick) -> Completion:
        self._forget_lengths()
        watch = _Watch(self._device, self.on_logits)
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
            output = self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=generation,
                logits_processor=LogitsProcessorList([watch]),
            )
        except _NotFiniteError:
            return not_finite(request, watch.new_tokens)
        new_ids = output[0, prompt.shape[1] :].tolist()
        ended = time.perf_counter()
        tick(len(new_ids))
        self._count(len(request.token_ids), watch.at - began, len(new_ids) - 1, ended - watch.at)
        stopped = new_ids[-1] in request.stop_ids and len(new_ids) > request.min_new_tokens
        return Completion(request, new_ids, "stop" if stopped else "length", watch.at - began, ended - watch.at)

    def _forget_lengths(self) -> None:
        """Gives rotations that grow with the length their first frequencies back: they may outlast a long prompt."""
        for module in self._model.modules():
            if getattr(module, "rope_type", None) == "dynamic":
                module.inv_freq = module.original_inv_freq.to(self._device, copy=True)
                module.max_seq_len_cached = module.original_max_seq_len

    def _count(self, prompt_tokens: int, prefill_s: float, decode_tokens: int, decode_s: float) -> None:
        self.clock.prefill_tokens += prompt_tokens
        self.clock.prefill_s += prefill_s
        self.clock.decode_tokens += decode_tokens
        self.clock.decode_s += decode_s
        self.clock.note_memory(self._device)


def _load_gguf(path: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    """Loads a GGUF file with its weights dequantised, which is the default before transformers 5.23."""
    try:
        from transformers import GgufConfig
    except ImportError:
        pass
    else:
        options = {**options, "quantization_config": GgufConfig(dequantize=True)}
    with alone(path) as folder:
        model, told = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, **options)
    return model, told


class _NotFiniteError(Exception):
    """Logits that are NaN or infinite."""


class _Watch(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped here
    """Notes when the first logits are there, and stops at logits that are not finite; changes nothing."""

    def __init__(self, device: torch.device, on_logits: Callable[[torch.Tensor], None] | None):
        self.at = 0.0
        self.new_tokens = -1
        self._device, self._on_logits = device, on_logits

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.new_tokens += 1
        if not scores.max().isfinite():  # which also waits for the device
            raise _NotFiniteError
        if not self.at:
            self.at = time.perf_counter()
        if self._on_logits is not None:
            self._on_logits(scores)
        return scores


def _with_default_attention(config: Any) -> Any:
    """A copy of a configuration whose kernels transformers chooses: sdpa, or eager where a model has no sdpa.

    config.json may name a kernel to be downloaded from the hub, also for a part of the model.
    """
    config = copy.deepcopy(config)
    pending = [config]
    while pending:
        part = pending.pop()
        if isinstance(part, PreTrainedConfig):
            part._attn_implementation = part._experts_implementation = None
            pending += vars(part).values()
        elif isinstance(part, list | tuple):
            pending += part
        elif isinstance(part, dict):
            pending += part.values()
    return config
