"""How concentrated attention is in each layer while checkpoints write the sample's answers, as Markdown tables."""

from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from sparsecache.synthetic.rows import load_template, make_rows

DATASETS = ("qasper", "hotpotqa", "dureader", "gov_report", "passage_count", "passage_retrieval_en", "lcc")


def concentration(model: Any, tokenizer: Any, row: dict[str, Any], top: float) -> Tensor:
    """[2, L]: entropy in nats, and the share of attention on the `top` share of tokens that have most of it.

    Both are means over the heads and over the steps that write the row's first answer and its end.
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
    most = attention.topk(round(top * ids.shape[1])).values.sum(-1)
    return torch.stack((entropy, most)).mean((2, 3))


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--rows", type=int, default=2, show_default=True, help="Rows of each of seven datasets.")
@click.option("--tokens", type=int, default=1500, show_default=True, help="Length of their prompts.")
@click.option("--seed", type=int, default=77, show_default=True)
@click.option("--top", type=float, default=0.05, show_default=True, help="Share of tokens whose attention is summed.")
def main(folders: tuple[Path, ...], rows: int, tokens: int, seed: int, top: float) -> None:
    """Measure the checkpoints in FOLDERS, on the CPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    asked = [row for dataset in DATASETS for row in make_rows(dataset, rows, tokens, seed)]
    found = {}
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        measured = [concentration(model, tokenizer, row, top) for row in asked]
        found[folder.name] = torch.stack(measured).mean(0)
    titles = ("entropy, nats", f"attention on the top {top:.0%} of tokens, %")
    for index, (title, scale) in enumerate(zip(titles, (1, 100), strict=True)):
        layers = range(next(iter(found.values())).shape[1])
        click.echo(f"| {title} | " + " | ".join(f"layer {layer}" for layer in layers) + " |")
        click.echo("|---" * (len(layers) + 1) + "|")
        for name, measures in found.items():
            click.echo(f"| {name} | " + " | ".join(f"{scale * value:.2f}" for value in measures[index]) + " |")
        click.echo()


if __name__ == "__main__":
    main()
