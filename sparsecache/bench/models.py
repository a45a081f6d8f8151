"""Models to measure: a checkpoint, or random weights in a named shape, shared by this engine and transformers."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sparsecache.cache.base import CacheMethod
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.families import load_family
from sparsecache.engine.families.base import Architecture
from sparsecache.engine.fp8 import COMPUTE_DTYPE, check_fp8_devices
from sparsecache.engine.generator import Generator
from sparsecache.engine.loading import Checkpoint
from sparsecache.engine.model_registry import checkpoint_folder, find_model
from sparsecache.engine.prefill_cache import PrefillCache, PrefillCachingDecoder
from sparsecache.engine.reference import TransformersEngine
from sparsecache.engine.rope import Rope
from sparsecache.engine.weights import Weights, read_weights
from sparsecache.errors import UsageError
from sparsecache.kernels.fp8 import FP8, to_tensor
from sparsecache.methods import make_method, option_errors, parse_options

_LLAMA_3 = {"rope_theta": 500000.0, "rope_type": "default"}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {},  # transformers' own defaults
    "llama-3.1-8b": {
        "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8, "rope_parameters": _LLAMA_3,
    },
    "llama-3.1-70b": {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "rope_parameters": _LLAMA_3,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    },
}  # fmt: skip
"""The fields of config.json in which the published checkpoints differ from the defaults of their model_type, llama."""


@dataclass(frozen=True)
class BenchModel:
    """A model in memory: its name, its transformers configuration, its weights, and calibrations by name."""

    name: str
    config: Any
    architecture: Architecture
    weights: Weights
    calibrations: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device of the embedding."""
        return self.weights.embedding.device

    @property
    def devices(self) -> list[torch.device]:
        """The devices of the layers, each once."""
        return list(dict.fromkeys(layer.qkv.device for layer in self.weights.layers))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, bfloat16 if the projections are in fp8."""
        return self.weights.embedding.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a decode step reads: all but the embedding, of which it reads one row."""
        matrices = [x for layer in self.weights.layers for x in vars(layer).values() if x is not None]
        return sum(x.nbytes for x in (*matrices, self.weights.norm, self.weights.head))

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return self.architecture.vocabulary

    def decoder(
        self, method: str = "vanilla", options: dict[str, str] | None = None, prompts: PrefillCache | None = None
    ) -> Decoder:
        """Return a decoder with a method, which is calibrated once, on random tokens, if it needs calibration.

        prompts: keeps the queries, keys and values of prompts for later decoders.
        """
        instance, text = self.method(method, options or {})
        parts = (self.architecture, self.weights, Rope(self.config, self.device), instance)
        decoder = Decoder(*parts) if prompts is None else PrefillCachingDecoder(*parts, prompts)
        if text is not None:
            self._calibrate(decoder, instance)
        return decoder

    def _calibrate(self, decoder: Decoder, method: CacheMethod) -> None:
        name = method.calibration_name
        if name in self.calibrations:
            method.restore(self.calibrations[name], self.architecture.shape)
            return
        with torch.inference_mode():
            token_ids = torch.randint(3, self.vocab_size, (1024,), generator=torch.Generator().manual_seed(0))
            decoder.calibrate(token_ids.to(self.device), lambda layers: None)
        self.calibrations[name] = method.calibration()

    def engine(self, method: str = "vanilla", options: dict[str, str] | None = None, slots: int = 1) -> Generator:
        """Return an engine of `slots` slots with a method."""
        return Generator(self.decoder(method, options), slots)

    def method(self, name: str, options: dict[str, str]) -> tuple[CacheMethod, str | None]:
        """Return a method and its calibration text. Raises UsageError for options that do not fit this model."""
        method = make_method(name, parse_options(name, options))
        with option_errors(name):
            method.check(self.architecture.shape)
            return method, method.calibration_text()

    def reference(self, **generation: Any) -> TransformersEngine:
        """Return transformers' engine over the same weights; `generation`: fields of its GenerationConfig."""
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype, attn_implementation="sdpa")
        model.load_state_dict(self._state(), strict=False, assign=True)
        with torch.device(self.device):  # not part of the state dict
            model.model.rotary_emb = type(model.model.rotary_emb)(config=self.config)
        missing = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
        if missing:
            raise RuntimeError(f"transformers' model has weights that this engine lacks: {', '.join(missing)}.")
        return TransformersEngine(model, self.device, **generation)

    def save(self, folder: Path) -> None:
        """Write a checkpoint for longbench_pred.py: one file per layer, and the bundled checkpoint's tokenizer."""
        folder.mkdir(parents=True)
        self.config.save_pretrained(folder)
        bundled = checkpoint_folder(find_model("demo"), offline=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(bundled / name, folder)
        files: dict[str, list[str]] = {}
        state = self._state()
        if self.weights.head.data_ptr() == self.weights.embedding.data_ptr():  # tied
            del state["lm_head.weight"]
        for name in state:
            layer = name.split(".")[2] if name.startswith("model.layers.") else "other"
            files.setdefault(f"model-{layer}.safetensors", []).append(name)
        for file, names in files.items():
            save_file({name: state[name].cpu().contiguous() for name in names}, folder / file, {"format": "pt"})
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def _state(self) -> dict[str, Tensor]:
        """Return views of the weights under transformers' names; of projections in fp8, dequantised copies."""
        shape, weights = self.architecture.shape, self.weights
        heads = [count * shape.head_dim for count in (shape.heads, shape.kv_heads, shape.kv_heads)]
        state = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
        state["lm_head.weight"] = weights.head
        for index, layer in enumerate(weights.layers):
            prefix = f"model.layers.{index}."
            fused: list[tuple[str, Tensor | None]] = []
            for kind, qkv, gate_up in (
                ("weight", to_tensor(layer.qkv), to_tensor(layer.gate_up)),
                ("bias", layer.qkv_bias, layer.gate_up_bias),
            ):
                if qkv is not None:
                    names = [f"self_attn.{name}_proj.{kind}" for name in "qkv"]
                    fused += zip(names, torch.split(qkv, heads), strict=True)
                if gate_up is not None:
                    fused += zip((f"mlp.gate_proj.{kind}", f"mlp.up_proj.{kind}"), gate_up.chunk(2), strict=True)
            single = [
                ("input_layernorm.weight", layer.input_norm),
                ("post_attention_layernorm.weight", layer.mlp_norm),
                ("self_attn.q_norm.weight", layer.q_norm),
                ("self_attn.k_norm.weight", layer.k_norm),
                ("self_attn.o_proj.weight", to_tensor(layer.output)),
                ("self_attn.o_proj.bias", layer.output_bias),
                ("mlp.down_proj.weight", to_tensor(layer.down)),
                ("mlp.down_proj.bias", layer.down_bias),
            ]
            state |= {f"{prefix}{name}": tensor for name, tensor in (*fused, *single) if tensor is not None}
        return state


def shape_config(name: str) -> Any:
    """Return transformers' configuration of a shape of SHAPES, for prompts of up to 262,144 tokens."""
    fields = {"model_type": "llama", "max_position_embeddings": 262144, **SHAPES[name]}
    model_type = fields.pop("model_type")
    return AutoConfig.for_model(model_type, architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]], **fields)


def checkpoint_path(model: str, weights: bool = True) -> Path:
    """Return the folder of a checkpoint, downloaded if need be; without `weights` these may be missing.

    Raises UsageError for an unknown model.
    """
    try:
        found = find_model(model)
    except UsageError as error:
        raise UsageError(f"{error} Shapes with random weights: {', '.join(SHAPES)}.") from error
    return checkpoint_folder(found, offline=False, weights=weights)


def vocab_size(model: str) -> int:
    """Return a model's number of token ids without loading its weights."""
    if model in SHAPES:
        return int(shape_config(model).vocab_size)
    checkpoint = Checkpoint(checkpoint_path(model, weights=False))
    return load_family(checkpoint.model_type).architecture(checkpoint.config).vocabulary


def load_bench_model(model: str, devices: Sequence[torch.device], dtype: torch.dtype) -> BenchModel:
    """Return a shape of SHAPES with random weights, made on the devices, or a checkpoint.

    dtype: float8_e4m3fn for projections in fp8. Raises UsageError for an unknown model, or devices without fp8.
    """
    if dtype == FP8:
        check_fp8_devices(devices)
    if model in SHAPES:
        return _random(model, shape_config(model), devices, dtype)
    checkpoint = Checkpoint(checkpoint_path(model))
    architecture = load_family(checkpoint.model_type).architecture(checkpoint.config)
    return BenchModel(model, checkpoint.config, architecture, checkpoint.load(architecture, devices, dtype))


def _random(name: str, config: Any, devices: Sequence[torch.device], dtype: torch.dtype) -> BenchModel:
    architecture, device = load_family(config.model_type).architecture(config), devices[0]
    generator = torch.Generator(device).manual_seed(0)

    kind = COMPUTE_DTYPE if dtype == FP8 else dtype

    def draw(tensor: str) -> Tensor:
        shape = architecture.tensors()[tensor]
        if tensor.endswith(".bias"):
            return torch.zeros(shape, device=device, dtype=kind)
        if len(shape) == 1:
            return torch.ones(shape, device=device, dtype=kind)
        return torch.randn(shape, device=device, dtype=kind, generator=generator).mul_(shape[1] ** -0.5)

    return BenchModel(name, config, architecture, read_weights(draw, architecture, devices, dtype))
