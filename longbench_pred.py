"""Predict: a checkpoint, a cache method and LongBench datasets in, pred/<model>/<name>/<dataset>.jsonl out."""

import sys
from pathlib import Path
from typing import Any

import click

from sparsecache.cli import FlexibleCommand, option, option_pairs, report_usage_errors
from sparsecache.methods import describe_methods
from sparsecache.options import LARGEST
from sparsecache.runner.settings import DTYPE_CHOICES, ENGINES, Settings
from sparsecache.versions import check_versions

_HELP = {
    "model": "Name of a table in configs/models.toml, a checkpoint folder, or a hub id.",
    "datasets": "Comma list of datasets (longbench_v2, longbench_v2_cot too), or: all, en, zh, a category, ruler or "
    "one of its tasks (vt, cwe, ...), own (the tasks of --tasks). The default is all, with --tasks own.",
    "tasks": "File of own tasks, in the form of configs/datasets.toml.",
    "max_new_tokens": "Most new tokens of each answer, in place of the dataset's own; recorded as a deviation.",
    "method": "Cache method (a file of sparsecache/methods).",
    "data": "hub, sample, a folder of <dataset>.jsonl, a zip of them, or one .jsonl file of rows; by default what the "
    "model's table names, "
    "else hub.",
    "name": "Folder of the run below the model's; by default the method and its options (infinigen-budget=256).",
    "model_name": "Folder of the model below --pred_dir; by default the checkpoint's own name.",
}


_COUNT = click.IntRange(1, LARGEST)


class BatchSize(click.ParamType[int | None]):
    """A number of sequences from 1 on, or auto, which is None."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        return None if value == "auto" else _COUNT.convert(value, param, ctx)


def _list_methods(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        for line in describe_methods():
            click.echo(line)
        context.exit()


_GROUPS = {
    "Checkpoint": "model model_type chat allow_pickle",
    "Data": "datasets tasks data data_revision e max_samples sample_rows sample_tokens sample_seed offline",
    "RULER": "ruler_length ruler_rows ruler_seed ruler_essays ruler_squad ruler_hotpotqa",
    "Method": "method options list_methods",
    "Prompts and answers": "max_length window max_new_tokens",
    "Speed and memory": "batch_size engine dtype device workers ray_address gpus_per_worker",
    "Output": "pred_dir model_name name overwrite verify quiet",
}


@click.command(cls=FlexibleCommand, groups=_GROUPS)
@option(Settings, "model", help=_HELP["model"])
@option(Settings, "model_type", help="Refuse the checkpoint unless its config.json says this model_type.")
@option(
    Settings,
    "chat",
    metavar="TEXT|template|none",
    help="Wrap prompts in TEXT, which holds {prompt}, in the tokenizer's chat template, or in nothing, instead of "
    "what the model's table says.",
)
@option(Settings, "datasets", help=_HELP["datasets"])
@option(Settings, "tasks", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help=_HELP["tasks"])
@option(Settings, "method", help=_HELP["method"])
@click.option("-o", "options", multiple=True, metavar="KEY=VALUE", help="An option of the method; repeatable.")
@click.option(
    "--list_methods",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_methods,
    help="Show every method with its options, defaults and what they mean, and exit.",
)
@option(Settings, "name", help=_HELP["name"])
@option(Settings, "model_name", help=_HELP["model_name"])
@click.option("--e", is_flag=True, help="LongBench-E: files are <dataset>_e.jsonl.")
@option(Settings, "data", help=_HELP["data"])
@option(Settings, "data_revision", help="Branch, tag or commit of the hub's data.")
@option(Settings, "sample_rows", type=_COUNT, help="Rows per dataset of --data sample.")
@option(
    Settings,
    "sample_tokens",
    type=click.IntRange(256, 32768),
    help="Prompt length of --data sample, estimated: 4 characters a token.",
)
@option(Settings, "sample_seed", type=click.IntRange(-LARGEST, LARGEST), help="Seed of --data sample.")
@option(
    Settings,
    "ruler_length",
    metavar="N[,N...]",
    help="Tokens of prompt and answer of RULER's tasks, by the checkpoint's tokenizer; several are separate datasets.",
)
@option(Settings, "ruler_rows", type=_COUNT, help="Rows per task and length of RULER; 500 are published.")
@option(Settings, "ruler_seed", type=click.IntRange(-LARGEST, LARGEST), help="Seed of RULER's rows.")
@option(
    Settings,
    "ruler_essays",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Essays as .txt files, for niah_single_2, niah_single_3, niah_multikey_1, niah_multivalue and "
    "niah_multiquery.",
)
@option(
    Settings,
    "ruler_squad",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="SQuAD's dev-v2.0.json, for qa_1.",
)
@option(
    Settings,
    "ruler_hotpotqa",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="HotpotQA's hotpot_dev_distractor_v1.json, for qa_2.",
)
@click.option("--offline", is_flag=True, help="Never touch the network: caches and local files only.")
@option(Settings, "max_samples", type=_COUNT, help="Only the first rows of each dataset.")
@option(Settings, "max_new_tokens", type=_COUNT, help=_HELP["max_new_tokens"])
@option(Settings, "max_length", type=click.IntRange(2, LARGEST), help="Cut the middle of raw prompts longer than this.")
@option(
    Settings,
    "window",
    type=click.IntRange(8, LARGEST),
    help="Tokens for prompt and answer together, at most the checkpoint's own.",
)
@option(
    Settings,
    "batch_size",
    type=BatchSize(),
    help="Sequences decoded together at most; auto (the default): 16 on a GPU, 1 on a CPU. Fewer if memory is short.",
)
@option(
    Settings,
    "workers",
    type=_COUNT,
    help="Processes that decode at once, on Ray; 1: this one alone.",
)
@option(Settings, "ray_address", help="HOST:PORT of a running Ray cluster, or auto; without it one is started here.")
@option(
    Settings,
    "gpus_per_worker",
    type=_COUNT,
    help="Split the layers over so many GPUs of one machine.",
)
@option(Settings, "dtype", type=click.Choice(DTYPE_CHOICES), help="auto: the checkpoint's on a GPU, float32 on a CPU.")
@option(Settings, "device", help="auto, cpu, cuda or cuda:<number>.")
@option(Settings, "engine", type=click.Choice(ENGINES), help="transformers: any model, slower.")
@option(
    Settings,
    "verify",
    type=click.IntRange(0, LARGEST),
    help="First compare this many prompts with transformers; differences are reported and recorded.",
)
@click.option("--quiet", is_flag=True, help="Print only warnings, errors and the result of --verify.")
@click.option("--allow_pickle", is_flag=True, help="Load .bin weights (restricted unpickling, no code).")
@click.option(
    "--overwrite", is_flag=True, help="Delete the whole run of this name, all its datasets, and start afresh."
)
@option(
    Settings, "pred_dir", type=click.Path(path_type=Path), help="Where runs are kept, relative to the current folder."
)
def main(options: tuple[str, ...], **values: Any) -> None:
    """Decode LongBench prompts with a checkpoint and write one JSON line per row.

    A run that was stopped goes on where it left off when the same command is given again (without --overwrite).
    """
    with report_usage_errors():
        settings = Settings(options=option_pairs(options), **values)
        settings.check()
        for warning in check_versions():
            click.echo(f"Warning: {warning}", err=True)
        from sparsecache.runner.run import run  # torch and transformers, only now

        try:
            sys.exit(run(settings))
        except KeyboardInterrupt:
            same = "the same command without --overwrite" if settings.overwrite else "the same command"
            click.echo(f"Stopped. Finished rows are kept; {same} goes on from there.", err=True)
            sys.exit(130)


if __name__ == "__main__":
    main()
