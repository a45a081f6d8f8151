"""Writes the trained model as a Hugging Face checkpoint folder (LlamaForCausalLM, bfloat16 safetensors)."""

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from tiny_llama import TinyLlama

WINDOW = 32768  # max_position_embeddings; longer than the longest lesson, so that longer prompts can be tried


def export(model: TinyLlama, tokenizer: Path, folder: Path, max_shard_mib: int) -> None:
    """Write config, tokenizer and weights to `folder`; weights above `max_shard_mib` MiB are sharded."""
    size = model.size
    folder.mkdir(parents=True, exist_ok=True)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=WINDOW,
        rms_norm_eps=size.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype="bfloat16",
    ).save_pretrained(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    for name, shard in _shards(model.state_for_transformers(), max_shard_mib * 2**20, folder):
        save_file(shard, folder / name, metadata={"format": "pt"})


def _shards(state: dict[str, Tensor], limit: int, folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield file names with their tensors, at most `limit` bytes each; write the index if there are several."""
    parts: list[dict[str, Tensor]] = [{}]
    for name, tensor in state.items():
        if parts[-1] and sum(t.nbytes for t in parts[-1].values()) + tensor.nbytes > limit:
            parts.append({})
        parts[-1][name] = tensor
    if len(parts) == 1:
        yield "model.safetensors", state
        return
    names = [f"model-{index:05d}-of-{len(parts):05d}.safetensors" for index in range(1, len(parts) + 1)]
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}}
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": weight_map}, indent=1))
    yield from zip(names, parts, strict=True)
