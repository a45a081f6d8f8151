"""The engine over transformers' generate: any architecture, one prompt at a time.

Without a CachedModel, attention and cache are transformers' own: the full cache, independent of this project's code.
"""

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
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

from sparsecache.engine.base import (
    Completion,
    OnTokens,
    Request,
    failed_completion,
    ignore_tokens,
    new_stats,
    not_finite_completion,
)
from sparsecache.engine.general.model import CachedModel
from sparsecache.engine.gguf_file import isolated_folder
from sparsecache.errors import UsageError


class TransformersEngine:
    """Greedy generation by transformers: the reference for this project's engine.

    model: the transformers model. cached: the model with the caches of a method; None: transformers' own cache.
    """

    def __init__(self, model: Any, device: torch.device, **generation: Any):
        """model: a transformers model on the device. generation: further fields of its GenerationConfig."""
        self.stats = new_stats(device)
        self.on_logits: Callable[[torch.Tensor], None] | None = None  # receives each step's logits [1, V]
        self.model = model
        self.cached: CachedModel | None = None
        self._device, self._generation = device, generation
        # Greedy decoding ignores the sampling settings and penalties of a checkpoint.
        self.model.generation_config = GenerationConfig()

    @classmethod
    def load(
        cls, path: Path, device: torch.device, dtype: torch.dtype, allow_pickle: bool = False, config: Any = None
    ) -> "TransformersEngine":
        """Load a checkpoint; config: a configuration to use instead of the checkpoint's own.

        Raises UsageError if transformers cannot load it without running its code, or if weights are missing.
        """
        options = {"config": config, "dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
        try:
            if path.suffix == ".gguf":
                model, loading_info = _load_gguf(path, options)
            else:
                config = _with_default_attention(config or AutoConfig.from_pretrained(path, trust_remote_code=False))
                use_safetensors = None if allow_pickle else True
                model, loading_info = AutoModelForCausalLM.from_pretrained(
                    path, use_safetensors=use_safetensors, **{**options, "config": config}
                )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # wrong shapes, a broken file, an architecture that generates no text
            raise UsageError(f"transformers cannot load {path}: {' '.join(str(error).split())}") from error
        if loading_info["missing_keys"]:
            raise UsageError(
                f"{path} does not fit its config.json: it lacks {', '.join(sorted(loading_info['missing_keys']))}."
            )
        return cls(model.to(device).eval(), device)

    def reserve(self, max_tokens: int, max_new_tokens: int | None = None) -> None:
        """Do nothing: transformers allocates per prompt."""

    def reset_stats(self) -> None:
        """Set the totals and the peak of GPU memory to zero."""
        self.stats = new_stats(self._device)

    def session(self) -> dict[str, Any]:
        """Return the stats as "clock", their key in run.json, and how many layers a method's caches serve.

        "cache" is the memory of these caches.
        """
        if self.cached is None:
            return {"clock": asdict(self.stats)}
        layers = {"full_attention_layers": self.cached.shape.layers, "layers": self.cached.num_layers}
        cache = {"cache": self.cached.memory.as_json()} if self.cached.memory else {}
        return {"clock": asdict(self.stats), **layers, **cache}

    def generate(self, requests: Iterable[Request], on_tokens: OnTokens = ignore_tokens) -> Iterator[Completion]:
        """Yield a completion per request, in order."""
        for request in requests:
            try:
                yield self._generate(request, on_tokens)
            except Exception as error:
                yield failed_completion(request, error)

    @torch.inference_mode()
    def _generate(self, request: Request, on_tokens: OnTokens) -> Completion:
        self._reset_dynamic_rope()
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
        cached = self.cached
        with cached.sequence(prompt.shape[1], request.max_new_tokens) if cached else nullcontext() as cache:
            try:
                output = self.model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=generation,
                    logits_processor=LogitsProcessorList([observer]),
                    **({"past_key_values": cache} if cache is not None else {}),
                )
            except _NotFiniteError:
                return not_finite_completion(request, observer.new_tokens)
            new_ids = output[0, prompt.shape[1] :].tolist()
            ended = time.perf_counter()
            report = cached.report() if cached else {}
        prefill_s, decode_s = observer.first_token_at - began, ended - observer.first_token_at
        on_tokens(len(new_ids))
        self._count(len(request.token_ids), prefill_s, len(new_ids) - 1, decode_s)
        stopped = new_ids[-1] in request.stop_ids and len(new_ids) > request.min_new_tokens
        return Completion(request, new_ids, "stop" if stopped else "length", prefill_s, decode_s, report)

    def _reset_dynamic_rope(self) -> None:
        """Restore the frequencies of dynamic RoPE, which transformers may keep from an earlier, longer prompt."""
        for module in self.model.modules():
            if getattr(module, "rope_type", None) == "dynamic":
                module.inv_freq = module.original_inv_freq.to(self._device, copy=True)
                module.max_seq_len_cached = module.original_max_seq_len

    def _count(self, prompt_tokens: int, prefill_s: float, decode_tokens: int, decode_s: float) -> None:
        self.stats.prefill_tokens += prompt_tokens
        self.stats.prefill_s += prefill_s
        self.stats.decode_tokens += decode_tokens
        self.stats.decode_s += decode_s
        self.stats.note_memory(self._device)


def _load_gguf(path: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    """Load a GGUF file with dequantised weights, the default before transformers 5.23."""
    try:
        from transformers import GgufConfig
    except ImportError:
        pass
    else:
        options = {**options, "quantization_config": GgufConfig(dequantize=True)}
    with isolated_folder(path) as folder:
        model, loading_info = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, **options)
    return model, loading_info


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
        if not scores.max().isfinite():  # which also waits for the device
            raise _NotFiniteError
        if not self.first_token_at:
            self.first_token_at = time.perf_counter()
        if self._on_logits is not None:
            self._on_logits(scores)
        return scores


def _with_default_attention(config: Any) -> Any:
    """Return a copy of a configuration with transformers' default kernels: sdpa, or eager if a model has no sdpa.

    config.json may name a kernel to download from the hub, also for a part of the model.
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
