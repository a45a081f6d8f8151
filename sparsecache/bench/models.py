"""Models to measure with: a checkpoint, or random weights in a named shape; once for us and transformers alike."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from sparsecache.cache.base import CacheMethod
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.families import load_family
from sparsecache.engine.families.base import Architecture
from sparsecache.engine.generator import Generator
from sparsecache.engine.loading import Checkpoint
from sparsecache.engine.model_registry import checkpoint_folder, find_model
from sparsecache.engine.reference import TransformersEngine
from sparsecache.engine.rope import Rope
from sparsecache.engine.weights import Weights, read_weights
from sparsecache.errors import UsageError
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
}  # fmt: skip
"""Fields of config.json in which published checkpoints differ from LlamaConfig's defaults."""


@dataclass(frozen=True)
class Subject:
    """A model in memory: what it is called, its transformers configuration, its weights."""

    name: str
    config: Any
    architecture: Architecture
    weights: Weights

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weights.embedding.device

    @property
    def devices(self) -> list[torch.device]:
        """Where the layers are, each device once."""
        return list(dict.fromkeys(layer.qkv.device for layer in self.weights.layers))

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are in."""
        return self.weights.embedding.dtype

    @property
    def nbytes(self) -> int:
        """What a decode step reads of the weights: all but the embedding, of which it reads a row."""
        matrices = [x for layer in self.weights.layers for x in vars(layer).values() if x is not None]
        return sum(x.nbytes for x in (*matrices, self.weights.norm, self.weights.head))

    @property
    def kv_nbytes(self) -> int:
        """Keys and values of one token."""
        return self.architecture.shape.kv_nbytes(self.dtype)

    def decoder(self, method: str = "vanilla", options: dict[str, str] | None = None) -> Decoder:
        """Return a decoder with a method, which is calibrated on random tokens if it needs calibration."""
        made, text = self.method(method, options or {})
        decoder = Decoder(self.architecture, self.weights, Rope(self.config, self.device), made)
        if text is not None:
            drawn = torch.Generator().manual_seed(0)
            with torch.inference_mode():
                token_ids = torch.randint(3, self.architecture.vocabulary, (1024,), generator=drawn)
                decoder.calibrate(token_ids.to(self.device), lambda layers: None)
        return decoder

    def engine(self, method: str = "vanilla", options: dict[str, str] | None = None, slots: int = 1) -> Generator:
        """Return an engine over a method."""
        return Generator(self.decoder(method, options), slots)

    def method(self, name: str, options: dict[str, str]) -> tuple[CacheMethod, str | None]:
        """A method for this model, and what it wants to be calibrated with; UsageError where it refuses its options."""
        made = make_method(name, parse_options(name, options))
        with option_errors(name):
            made.check(self.architecture.shape)
            return made, made.calibration_text()

    def reference(self, **generation: Any) -> TransformersEngine:
        """transformers' engine over the same memory; `generation` are fields of its GenerationConfig."""
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype, attn_implementation="sdpa")
        model.load_state_dict(self._state(), strict=False, assign=True)
        with torch.device(self.device):  # what no state holds
            model.model.rotary_emb = type(model.model.rotary_emb)(config=self.config)
        missing = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
        if missing:
            raise RuntimeError(f"transformers' model has weights that ours has not: {', '.join(missing)}.")
        return TransformersEngine(model, self.device, **generation)

    def save(self, folder: Path) -> None:
        """Writes a checkpoint that longbench_pred.py takes, a file a layer, with the bundled checkpoint's tokenizer."""
        folder.mkdir(parents=True)
        self.config.save_pretrained(folder)
        bundled = checkpoint_folder(find_model("demo"), offline=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(bundled / name, folder)
        files: dict[str, list[str]] = {}
        state = self._state()
        for name in state:
            layer = name.split(".")[2] if name.startswith("model.layers.") else "ends"
            files.setdefault(f"model-{layer}.safetensors", []).append(name)
        for file, names in files.items():
            save_file({name: state[name].cpu().contiguous() for name in names}, folder / file, {"format": "pt"})
        places = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def _state(self) -> dict[str, Tensor]:
        """Views of the weights under transformers' names."""
        shape, weights = self.architecture.shape, self.weights
        heads = [count * shape.head_dim for count in (shape.heads, shape.kv_heads, shape.kv_heads)]
        state = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
        state["lm_head.weight"] = weights.head
        for index, layer in enumerate(weights.layers):
            prefix = f"model.layers.{index}."
            fused: list[tuple[str, Tensor | None]] = []
            for kind, qkv, gate_up in (
                ("weight", layer.qkv, layer.gate_up),
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
                ("self_attn.o_proj.weight", layer.output),
                ("self_attn.o_proj.bias", layer.output_bias),
                ("mlp.down_proj.weight", layer.down),
                ("mlp.down_proj.bias", layer.down_bias),
            ]
            state |= {f"{prefix}{name}": tensor for name, tensor in (*fused, *single) if tensor is not None}
        return state


def folder_of(model: str, weights: bool = True) -> Path:
    """The checkpoint that `--model` names where it is no shape, with its weights if they are wanted.

    Raises UsageError, naming the shapes, too, for an unknown model.
    """
    try:
        found = find_model(model)
    except UsageError as error:
        raise UsageError(f"{error} Shapes with random weights are {', '.join(SHAPES)}.") from error
    return checkpoint_folder(found, offline=False, weights=weights)


def vocabulary_of(model: str) -> int:
    """How many token ids a model knows; nothing else of it is loaded."""
    if model in SHAPES:
        return int(LlamaConfig(**SHAPES[model]).vocab_size)
    checkpoint = Checkpoint(folder_of(model, weights=False))
    return load_family(checkpoint.model_type).architecture(checkpoint.config).vocabulary


def load_subject(model: str, devices: Sequence[torch.device], dtype: torch.dtype) -> Subject:
    """A shape of SHAPES with random weights made on the devices, or what `--model` names elsewhere.

    Raises UsageError for an unknown model.
    """
    if model in SHAPES:
        return _random(model, LlamaConfig(**SHAPES[model], max_position_embeddings=262144), devices, dtype)
    checkpoint = Checkpoint(folder_of(model))
    architecture = load_family(checkpoint.model_type).architecture(checkpoint.config)
    return Subject(model, checkpoint.config, architecture, checkpoint.load(architecture, devices, dtype))


def _random(name: str, config: Any, devices: Sequence[torch.device], dtype: torch.dtype) -> Subject:
    architecture, device = load_family(config.model_type).architecture(config), devices[0]
    generator = torch.Generator(device).manual_seed(0)

    def draw(tensor: str) -> Tensor:
        shape = architecture.tensors()[tensor]
        if len(shape) == 1:
            return torch.ones(shape, device=device, dtype=dtype)
        return torch.randn(shape, device=device, dtype=dtype, generator=generator).mul_(shape[1] ** -0.5)

    return Subject(name, config, architecture, read_weights(draw, architecture, devices, dtype))
