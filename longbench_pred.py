"""Decodes LongBench prompts with a checkpoint and a cache method into pred/<model>/<name>/<dataset>.jsonl."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from sparsecache.cli import FlexibleCommand, option, option_pairs, report_usage_errors
from sparsecache.methods import describe_methods, load_method, method_names, method_options
from sparsecache.options import LARGEST
from sparsecache.runner.settings import DTYPE_CHOICES, ENGINES, MINIMA, Settings
from sparsecache.versions import check_versions

_HELP = {
    "model": "A checkpoint folder, a .gguf file, a hub id, or a name of configs/models.toml.",
    "datasets": "Comma-separated: datasets, all, en, zh, a category, longbench_v2, longbench_v2_cot, ruler or its "
    "tasks (vt, cwe, ...), own (those of --tasks). Default: all; own with --tasks.",
    "tasks": "File of own tasks, in the form of configs/datasets.toml.",
    "max_new_tokens": "Maximum number of new tokens per answer, instead of the dataset's limit. run.json records it.",
    "method": "A built-in cache method, the path of a .py file, or a module's dotted name.",
    "data": "hub, sample, a folder or zip of <dataset>.jsonl files, or one .jsonl file of rows. Default: hub; sample "
    "for the bundled checkpoint.",
    "name": "Name of the run's folder. Default: the method and the options given (infinigen-budget=256).",
    "model_name": "Name of the model's folder below --pred_dir. Default: the checkpoint's name.",
}


def _count(name: str, help: str) -> Callable[[Any], Any]:
    """Returns the option of a setting that is a count."""
    return option(Settings, name, type=click.IntRange(MINIMA[name], LARGEST), help=help)


class BatchSize(click.ParamType[int | None]):
    """A number of sequences from 1 on, or auto, which is None."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value == "auto":
            return None
        return click.IntRange(MINIMA["batch_size"], LARGEST).convert(value, param, ctx)


class PredictCommand(FlexibleCommand):
    """A command whose errors show how an option of the method is given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.ignore_unknown_options = ctx.allow_extra_args = True  # they are in `rest`, once the method is known
        rest = super().parse_args(ctx, args)
        if rest and not ctx.resilient_parsing:
            self._refuse(ctx, *rest[:2])
        return rest

    def _refuse(self, ctx: click.Context, first: str, second: str = "") -> NoReturn:
        flag, equals, value = first.partition("=")
        if not first.startswith("-"):
            hint = f" An option of the method is given as -o {first}." if equals else ""
            ctx.fail(f"Got unexpected extra argument ({first}).{hint}")
        name = flag.lstrip("-")
        pair = f"{name}={value or ('' if second.startswith('--') else second) or 'VALUE'}"
        if ctx.get_parameter_source("method") is not ParameterSource.DEFAULT:
            if name in method_options(load_method(ctx.params["method"])):
                ctx.fail(f"No such option {flag!r}. It is an option of the method: -o {pair}.")
        elif any(name in method_options(load_method(method)) for method in method_names()):
            ctx.fail(f"No such option {flag!r}. It is an option of methods: --method NAME -o {pair}.")
        raise click.NoSuchOption(flag, possibilities=[flag for param in self.params for flag in param.opts], ctx=ctx)


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


@click.command(cls=PredictCommand, groups=_GROUPS)
@option(Settings, "model", help=_HELP["model"])
@option(Settings, "model_type", help="Refuse the checkpoint unless its config.json says this model_type.")
@option(
    Settings,
    "chat",
    metavar="TEXT|template|none",
    help="Wrapper of prompts: the tokenizer's chat template, none, or a TEXT that contains {prompt}. Default: that "
    "of configs/models.toml, else the template, if there is one.",
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
    help="Print all methods with their options, and exit.",
)
@option(Settings, "name", help=_HELP["name"])
@option(Settings, "model_name", help=_HELP["model_name"])
@click.option("--e", is_flag=True, help="LongBench-E: files are <dataset>_e.jsonl.")
@option(Settings, "data", help=_HELP["data"])
@option(Settings, "data_revision", help="Branch, tag or commit of the hub's data.")
@_count("sample_rows", help="Rows per dataset of --data sample.")
@option(
    Settings,
    "sample_tokens",
    type=click.IntRange(256, 32768),
    help="Tokens per prompt of --data sample, at 4 characters per token.",
)
@option(Settings, "sample_seed", type=click.IntRange(-LARGEST, LARGEST), help="Seed of --data sample.")
@option(
    Settings,
    "ruler_length",
    metavar="N[,N...]",
    help="Tokens of prompt and answer together in RULER's tasks. Each length is a dataset of its own.",
)
@_count("ruler_rows", help="Rows per task and length of RULER. The paper has 500.")
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
@click.option("--offline", is_flag=True, help="Use no network, only caches and local files.")
@_count("max_samples", help="Only the first rows of each dataset.")
@_count("max_new_tokens", help=_HELP["max_new_tokens"])
@_count(
    "max_length",
    help="Maximum number of tokens per prompt, without its wrapper. Longer prompts are cut in the middle.",
)
@_count(
    "window",
    help="Maximum number of tokens of prompt and answer together. Default and upper limit: the checkpoint's.",
)
@option(
    Settings,
    "batch_size",
    type=BatchSize(),
    help="Maximum number of sequences decoded together. auto (default): 16 on a GPU, or as memory allows; 1 on a CPU.",
)
@_count(
    "workers",
    help="Worker processes on Ray. 1: decode in this process.",
)
@option(
    Settings, "ray_address", help="HOST:PORT of a running Ray cluster, or auto. Default: start one on this machine."
)
@_count(
    "gpus_per_worker",
    help="GPUs of one machine that share the layers.",
)
@option(
    Settings,
    "dtype",
    type=click.Choice(DTYPE_CHOICES),
    help="auto: the checkpoint's on a GPU, float32 on a CPU. fp8: weights in 8 bits, on a GPU.",
)
@option(Settings, "device", help="auto, cpu, cuda or cuda:<number>.")
@option(
    Settings,
    "engine",
    type=click.Choice(ENGINES),
    help="transformers: slower, for models that the other engine does not run.",
)
@_count(
    "verify",
    help="Prompts whose texts are first compared with transformers. Differences are recorded.",
)
@click.option("--quiet", is_flag=True, help="Print only warnings, errors and the result of --verify.")
@click.option("--allow_pickle", is_flag=True, help="Load .bin weights (restricted unpickling, no code).")
@click.option("--overwrite", is_flag=True, help="Delete the run of this name with all its datasets, and start again.")
@option(Settings, "pred_dir", type=click.Path(path_type=Path), help="Folder of all runs.")
def main(options: tuple[str, ...], **values: Any) -> None:
    """Decode LongBench prompts with a checkpoint and write one JSON line per row.

    Rerun the command, without --overwrite, to resume a stopped run.
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
            click.echo(f"Stopped. Finished rows are kept. Rerun {same} to resume.", err=True)
            sys.exit(130)


if __name__ == "__main__":
    main()
