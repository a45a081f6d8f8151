"""Writes tiny checkpoints with random weights in the Hugging Face layout, for tests and for trying things.

    python -m sparsecache.testing.random_checkpoint FOLDER --model_type qwen3

They load like any checkpoint of their family. The text that they generate is random.
"""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsecache.cli import FlexibleCommand, report_usage_errors
from sparsecache.errors import UsageError, one_line
from sparsecache.synthetic.rows import make_rows
from sparsecache.synthetic.tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS, build_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
VOCAB_SIZE = 1024
_TOKENIZER_DATASETS = ("narrativeqa", "hotpotqa", "samsum", "multifieldqa_zh", "lsht", "passage_retrieval_zh", "lcc")


def make_random_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    model_type: str = "llama",
    dtype: str = "float32",
    device: str = "cpu",
    **overrides: Any,
) -> Path:
    """Write a checkpoint of one of MODEL_TYPES with random weights to `folder`, and return `folder`.

    `overrides` are fields of the family's config, so a checkpoint can have the shape of a real model. Weights are drawn
    on `device`: a GPU is faster for large shapes. The tokenizer is always the same byte-level BPE of 1,024 entries; it
    adds one `<s>` before a text and has no chat template. The folder is written completely or not at all. An existing
    folder is returned unchanged. Raises UsageError for another model type.
    """
    if model_type not in MODEL_TYPES:
        raise UsageError(f"model_type {model_type!r} is not supported. Supported: {', '.join(MODEL_TYPES)}.")
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        unfinished = Path(temporary) / folder.name
        _save_checkpoint(unfinished, _make_config(model_type, overrides), seed, dtype, device)
        _move(unfinished, folder)
    return folder


def _move(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        # Another process may have written the same checkpoint first.
        if not folder.exists():
            raise


def _make_config(model_type: str, overrides: dict[str, Any]) -> "PretrainedConfig":
    from transformers import AutoConfig

    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        # With the usual 0.02 the logits of so narrow a model are almost equal, and rounding decides the greedy token.
        "initializer_range": 0.1,
        "bos_token_id": SPECIAL_TOKENS.index(BOS),
        "eos_token_id": SPECIAL_TOKENS.index(EOS),
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
    }
    defaults = AutoConfig.for_model(model_type)
    optional = {"head_dim": 16, "sliding_window": None}
    settings |= {name: value for name, value in optional.items() if hasattr(defaults, name)}
    return AutoConfig.for_model(model_type, **settings | overrides)


def _save_checkpoint(folder: Path, config: "PretrainedConfig", seed: int, dtype: str, device: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    small_tokenizer(config.max_position_embeddings).save_pretrained(folder)


def small_tokenizer(model_max_length: int) -> "PreTrainedTokenizerFast":
    """The tokenizer of random checkpoints, trained on synthetic English, Chinese and code. Deterministic."""
    from transformers import PreTrainedTokenizerFast

    rows = [row for dataset in _TOKENIZER_DATASETS for row in make_rows(dataset, 4, 1024, 0)]
    return PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer([row["context"] + row["input"] for row in rows], VOCAB_SIZE),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        # A byte-level BPE has no unknown text, but Qwen2's tokenizer class adds a token if none is given.
        unk_token=EOS,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def _parse_field(field: str) -> tuple[str, Any]:
    key, _, value = field.partition("=")
    try:
        return key, json.loads(value)
    except ValueError as error:
        raise UsageError(f"-c {field!r} is not KEY=VALUE with a JSON value, such as hidden_size=128.") from error


@click.command(cls=FlexibleCommand)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model_type", type=click.Choice(MODEL_TYPES), default="llama", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the weights.")
@click.option("--dtype", type=click.Choice(("float32", "bfloat16", "float16")), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Device on which the weights are drawn.")
@click.option("-c", "fields", multiple=True, metavar="KEY=VALUE", help="Set a field of config.json; repeatable.")
def main(folder: Path, model_type: str, seed: int, dtype: str, device: str, fields: tuple[str, ...]) -> None:
    """Write a checkpoint with random weights to FOLDER. It is tiny unless -c sets larger sizes."""
    if folder.exists():
        click.echo(f"{folder} already exists and was left unchanged.")
        return
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with report_usage_errors():
        overrides = dict(_parse_field(field) for field in fields)
        try:
            make_random_checkpoint(folder, seed=seed, model_type=model_type, dtype=dtype, device=device, **overrides)
        except Exception as error:  # transformers and torch raise many types for bad sizes, devices and full disks
            settings = " ".join(fields) or "default sizes"
            raise UsageError(
                f"Could not write a {model_type} checkpoint with {settings} to {folder} (device {device}): "
                f"{one_line(error)}"
            ) from error
    click.echo(f"Wrote a {model_type} checkpoint with random weights to {folder}. Its scores are meaningless.")


if __name__ == "__main__":
    main()
