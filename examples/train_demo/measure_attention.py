"""Measures how concentrated attention is per layer while checkpoints write answers; prints Markdown tables.

python examples/train_demo/measure_attention.py sparsecache/demo/checkpoint OTHER_CHECKPOINT
"""

from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from sparsecache.synthetic.rows import load_template, make_rows

DATASETS = ("qasper", "hotpotqa", "dureader", "gov_report", "passage_count", "passage_retrieval_en", "lcc")


def concentration(model: Any, tokenizer: Any, row: dict[str, Any], top: float) -> Tensor:
    """Attention entropy in nats, and the fraction of attention on the `top` fraction of tokens: [2, L].

    Both are means over heads and over the decode steps of the row's first answer, EOS included.
    """
    prompt = load_template(row["dataset"]).format(**row)
    answer = f" {row['answers'][0]}" if prompt.endswith(":") else row["answers"][0]
    prompt_ids = tokenizer(prompt).input_ids
    answer_ids = tokenizer(answer, add_special_tokens=False).input_ids
    steps = len(answer_ids) + 1
    ids = torch.tensor([prompt_ids + answer_ids])
    with torch.no_grad():
        layers = model(ids, output_attentions=True, logits_to_keep=1).attentions
    attention = torch.stack([layer[0, :, -steps:] for layer in layers])  # [L, H, steps, S]
    entropy = torch.special.entr(attention).sum(-1)
    top_share = attention.topk(round(top * ids.shape[1])).values.sum(-1)
    return torch.stack((entropy, top_share)).mean((2, 3))


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--rows", type=int, default=2, show_default=True, help="Rows per dataset, of seven datasets.")
@click.option("--tokens", type=int, default=1500, show_default=True, help="Prompt length, tokens.")
@click.option("--seed", type=int, default=77, show_default=True)
@click.option(
    "--top", type=float, default=0.05, show_default=True, help="Fraction of the tokens whose attention is summed."
)
def main(folders: tuple[Path, ...], rows: int, tokens: int, seed: int, top: float) -> None:
    """Measure the checkpoints in FOLDERS, on the CPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    rows_measured = [row for dataset in DATASETS for row in make_rows(dataset, rows, tokens, seed)]
    results = {}
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        measured = [concentration(model, tokenizer, row, top) for row in rows_measured]
        results[folder.name] = torch.stack(measured).mean(0)
    titles = ("entropy, nats", f"attention on the top {top:.0%} of tokens, %")
    for index, (title, scale) in enumerate(zip(titles, (1, 100), strict=True)):
        layers = range(next(iter(results.values())).shape[1])
        click.echo(f"| {title} | " + " | ".join(f"layer {layer}" for layer in layers) + " |")
        click.echo("|---" * (len(layers) + 1) + "|")
        for name, measures in results.items():
            click.echo(f"| {name} | " + " | ".join(f"{scale * value:.2f}" for value in measures[index]) + " |")
        click.echo()


if __name__ == "__main__":
    main()
