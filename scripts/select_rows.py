"""Write the rows whose prompts are longer than some tokens of a checkpoint's tokenizer, as <dataset>.jsonl files.

    python scripts/select_rows.py --model llama-3.1-8b-instruct --datasets en --longer_than 4096 --out rows/4k

The tokens are those of the filled template, before it is cut and wrapped. Give the folder to --data.
"""

from pathlib import Path

import click

from sparsecache.cli import FlexibleCommand, make_folder, report_usage_errors
from sparsecache.errors import UsageError
from sparsecache.files import write_atomically
from sparsecache.longbench.jsonl import dumps
from sparsecache.options import LARGEST
from sparsecache.runner.settings import Settings


@click.command(cls=FlexibleCommand)
@click.option("--model", required=True, help="Checkpoint whose tokenizer counts.")
@click.option("--datasets", default="all", show_default=True, help="As that of longbench_pred.py.")
@click.option("--data", default="hub", show_default=True, help="As that of longbench_pred.py.")
@click.option("--longer_than", type=click.IntRange(0, LARGEST), required=True, help="Tokens that a prompt must exceed.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Output folder.")
def main(model: str, datasets: str, data: str, longer_than: int, out: Path) -> None:
    """Write the rows with prompts longer than --longer_than tokens to --out. Files of the same names are replaced.

    A dataset without such rows gets no file.
    """
    with report_usage_errors():
        settings = Settings(model=model, datasets=datasets, data=data, engine="transformers")  # any family
        settings.check()
        if other := [task.name for task in settings.wanted_tasks() if task.benchmark != "longbench"]:
            raise UsageError(f"{', '.join(other)}: only rows of LongBench can be selected. Leave it out of --datasets.")
        from sparsecache.runner.context import RunContext  # imports transformers
        from sparsecache.runner.wanted import load_wanted

        context = RunContext(settings)
        total = 0
        for dataset in load_wanted(settings, context).datasets:
            rows = [dict(row) for row in dataset.rows.dataset]
            chosen = [row for row in rows if context.prompter.build(dataset.task, row).original_tokens > longer_than]
            click.echo(f"{dataset.stem}: {len(chosen)} of {len(rows)} rows")
            file = out / f"{dataset.stem}.jsonl"
            if chosen:
                make_folder(out, "--out")
                write_atomically(file, "".join(dumps(row) + "\n" for row in chosen))
            elif file.exists():
                raise UsageError(f"{file} exists, but no row was chosen for it. Remove it, or choose another --out.")
            total += len(chosen)
        if not total:
            raise UsageError(f"No prompt is longer than {longer_than} tokens. Pass a smaller --longer_than.")
        click.echo(f"Wrote {total} rows to {out}.")


if __name__ == "__main__":
    main()
