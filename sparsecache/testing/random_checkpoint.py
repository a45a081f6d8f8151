"""A tiny checkpoint in the standard Hugging Face layout with random weights, for tests and first steps.

It behaves as any checkpoint of its family does, but what it writes means nothing.
"""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsecache.cli import FlexibleCommand, report_usage_errors
from sparsecache.errors import UsageError
from sparsecache.synthetic.rows import make_rows
from sparsecache.synthetic.tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS, build_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
VOCABULARY = 1024
_TRAINED_ON = ("narrativeqa", "hotpotqa", "samsum", "multifieldqa_zh", "lsht", "passage_retrieval_zh", "lcc")


def make_random_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    model_type: str = "llama",
    dtype: str = "float32",
    device: str = "cpu",
    **overrides: Any,
) -> Path:
    """Write a checkpoint of one of MODEL_TYPES with random weights to `folder`, and return that.

    `overrides` are fields of the family's config; weights are drawn on `device`, which makes the shape of a
    real model quick to try. The tokenizer is the same every time: a byte-level BPE of
    1,024 entries that puts one `<s>` before a text and has no chat template. The folder appears whole or not
    at all; one that exists is returned unchanged. Raises UsageError for another model type.
    """
    if model_type not in MODEL_TYPES:
        raise UsageError(f"There is no random checkpoint of type {model_type!r}. Types: {', '.join(MODEL_TYPES)}.")
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
        # Another process may have finished the same checkpoint first.
        if not folder.exists():
            raise


def _make_config(model_type: str, overrides: dict[str, Any]) -> "PretrainedConfig":
    from transformers import AutoConfig

    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        # The usual 0.02 leaves the logits of so narrow a model almost equal, and greedy decoding to rounding.
        "initializer_range": 0.1,
        "bos_token_id": SPECIAL_TOKENS.index(BOS),
        "eos_token_id": SPECIAL_TOKENS.index(EOS),
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
    }
    defaults = AutoConfig.for_model(model_type)
    where_known = {"head_dim": 16, "sliding_window": None}
    settings |= {name: value for name, value in where_known.items() if hasattr(defaults, name)}
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
    """The checkpoint's tokenizer, trained on the sample's English, Chinese and code; the same every time."""
    from transformers import PreTrainedTokenizerFast

    rows = [row for dataset in _TRAINED_ON for row in make_rows(dataset, 4, 1024, 0)]
    return PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer([row["context"] + row["input"] for row in rows], VOCABULARY),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        # Bytes are never unknown. But Qwen2's tokenizer class adds a token of its own where none is named.
        unk_token=EOS,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def _parse_field(field: str) -> tuple[str, Any]:
    key, _, value = field.partition("=")
    try:
        return key, json.loads(value)
    except ValueError as error:
        raise UsageError(f"-c {field!r} is not KEY=VALUE with a JSON value, like hidden_size=128.") from error


@click.command(cls=FlexibleCommand)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model_type", type=click.Choice(MODEL_TYPES), default="llama", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the weights.")
@click.option("--dtype", type=click.Choice(("float32", "bfloat16", "float16")), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Where the weights are drawn.")
@click.option("-c", "fields", multiple=True, metavar="KEY=VALUE", help="A field of config.json; repeatable.")
def main(folder: Path, model_type: str, seed: int, dtype: str, device: str, fields: tuple[str, ...]) -> None:
    """Write a checkpoint with random weights to FOLDER: a tiny one, or one of the shape that -c asks for."""
    if folder.exists():
        click.echo(f"{folder} exists already and is left as it is.")
        return
    with report_usage_errors():
        overrides = dict(_parse_field(field) for field in fields)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    make_random_checkpoint(folder, seed=seed, model_type=model_type, dtype=dtype, device=device, **overrides)
    click.echo(f"{folder} holds a {model_type} checkpoint. Its weights are random, so scores mean nothing.")


if __name__ == "__main__":
    main()
