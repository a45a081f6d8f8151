"""Evaluate: prediction folders in, official scores out. Imports no torch."""

import sys
from pathlib import Path

import click

from sparsecache.cli import FlexibleCommand, report_usage_errors
from sparsecache.errors import UsageError
from sparsecache.longbench.metrics import EDIT_BACKENDS


@click.command(cls=FlexibleCommand)
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path))
@click.option("--model", help="Model folder of the run, with --name.")
@click.option("--name", help="Name of the run, with --model.")
@click.option("--pred_dir", type=click.Path(path_type=Path), default=Path("pred"), show_default=True)
@click.option("--e", is_flag=True, help="Score LongBench-E files, by length bucket.")
@click.option("--allow_partial", is_flag=True, help="Exit with 0 even if rows are missing or failed.")
@click.option("--allow_duplicates", is_flag=True, help="Score repeated _ids as often as they stand there.")
@click.option("--edit_backend", type=click.Choice(EDIT_BACKENDS), default=EDIT_BACKENDS[0], show_default=True)
@click.option("--official_recursion", is_flag=True, help="Give 0.0 where the reference hits the recursion limit.")
@click.option("--rouge_score", is_flag=True, help="Show rouge-score's ROUGE-1/2/L beside the official ROUGE-L.")
def main(
    folders: tuple[Path, ...],
    model: str | None,
    name: str | None,
    pred_dir: Path,
    e: bool,
    allow_partial: bool,
    allow_duplicates: bool,
    edit_backend: str,
    official_recursion: bool,
    rouge_score: bool,
) -> None:
    """Score the predictions in FOLDERS, or those of --model and --name.

    Writes result.json (the official shape) and summary.json beside them and prints a table. Exit code: 0, 1
    when a file is incomplete, 2 when something cannot be scored.
    """
    with report_usage_errors():
        if (model is None) != (name is None) or (model is None) == (not folders):
            raise UsageError("Give either --model and --name, or the paths of prediction folders.")
        if model is not None and name is not None:
            folders = (pred_dir / model / name,)
        from sparsecache.longbench.report import score_table, write_results
        from sparsecache.longbench.scores import Options, score_run

        options = Options(edit_backend, official_recursion, rouge_score, allow_duplicates)
        complete = True
        for folder in folders:
            result = score_run(folder, e, options)
            print(score_table(result))
            paths = write_results(result, options)
            print(f"Written: {', '.join(str(path) for path in paths)}\n")
            complete &= result.complete
        sys.exit(0 if complete or allow_partial else 1)


if __name__ == "__main__":
    main()
