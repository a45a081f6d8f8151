"""Write the rows of `--data sample` as <dataset>.jsonl files, for `--data FOLDER` or for other programs."""

from pathlib import Path

import click

from sparsecache.cli import FlexibleCommand, make_folder, report_usage_errors
from sparsecache.files import write_atomically
from sparsecache.longbench.tasks import select_tasks
from sparsecache.options import LARGEST
from sparsecache.runner.settings import Settings
from sparsecache.synthetic.source import SampleSource


@click.command(cls=FlexibleCommand)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Output folder.")
@click.option(
    "--datasets", default="all", show_default=True, help="Comma-separated datasets, or all, en, zh, or a category."
)
@click.option(
    "--rows", type=click.IntRange(1, LARGEST), default=Settings.sample_rows, show_default=True, help="Rows per dataset."
)
@click.option("--tokens", type=int, default=Settings.sample_tokens, show_default=True, help="Prompt length.")
@click.option("--seed", type=click.IntRange(-LARGEST, LARGEST), default=Settings.sample_seed, show_default=True)
def main(out: Path, datasets: str, rows: int, tokens: int, seed: int) -> None:
    """Write the rows of --data sample (with --sample_rows, --sample_tokens, --sample_seed) as files to --out.

    Existing files of the same names are replaced.
    """
    with report_usage_errors():
        source = SampleSource(rows, tokens, seed)
        files = [(task, source.read(task, e=False)[1]) for task in select_tasks(datasets)]
        make_folder(out, "--out")
        for task, lines in files:
            write_atomically(out / f"{task.file_stem(False)}.jsonl", lines)
    click.echo(f"Wrote {len(files)} files of {rows} rows each to {out}.")


if __name__ == "__main__":
    main()
