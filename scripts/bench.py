r"""Measure decode, prefill, replay or start-up beside baselines and the machine's roofline, over the same prompts.

    python scripts/bench.py decode --model llama-3.1-8b --tokens 8192,32768
    python scripts/bench.py decode --model llama-3.1-8b --tokens 131072 --method quest -o budget=0.05
    python scripts/bench.py decode --model llama-3.1-8b --tokens 8192,32768 --batch 1,8 --methods all -o budget=0.05
    python scripts/bench.py decode --model llama-3.1-8b --tokens 32768 --method infinigen -o alpha=inf -o offload=true \
        --vary budget=0.02,0.05,0.1,0.2 --baselines offloaded,vanilla_offload
    python scripts/bench.py decode --model llama-3.1-70b --gpus 2 --baselines none
    python scripts/bench.py prefill --model llama-3.1-8b --tokens 8192
    python scripts/bench.py replay --model llama-3.1-8b --workload workload.csv --rows 100
    python scripts/bench.py replay --model llama-3.1-8b --workload workload.csv --method snapkv --baselines vanilla
    python scripts/bench.py replay --model llama-3.1-8b --workload workload.csv --workers 2
    python scripts/bench.py startup --model llama-3.1-8b
    python scripts/bench.py decode --model demo --device cpu --tokens 2048

A named shape has random weights, made on the device. --model also takes every checkpoint of longbench_pred.py.
"""

import sys
from pathlib import Path

import click
from click.core import ParameterSource

from sparsecache.bench.models import SHAPES, load_bench_model
from sparsecache.bench.modes import BASELINES, OWN_BASELINES, profile_decode
from sparsecache.bench.session import BenchRun
from sparsecache.bench.specs import check_specs, combinations, specs_of_methods
from sparsecache.bench.vllm_baseline import Vllm
from sparsecache.bench.workload import Workload, sample_requests
from sparsecache.cli import FlexibleCommand, make_folder, option_pairs, report_usage_errors
from sparsecache.engine.devices import find_device, find_devices
from sparsecache.engine.loading import DTYPES
from sparsecache.errors import UsageError, short
from sparsecache.methods import method_names
from sparsecache.runner.settings import check_for_ray

MODES = ("decode", "prefill", "replay", "startup")
_MODES_OF = {
    "tokens": ("decode", "prefill", "startup"),
    **dict.fromkeys(("workload", "rows", "slots", "workers"), ("replay",)),
    **dict.fromkeys(("method", "options"), ("decode", "replay")),
    **dict.fromkeys(("batch", "new_tokens", "methods", "vary", "gpus", "profiled"), ("decode",)),
}
_OLD_NAMES = {"streamed": "vanilla_offload"}
_MAX_TOKENS = 2**26  # tokens of a whole batch: beyond the memory of any machine


@click.command(cls=FlexibleCommand)
@click.argument("mode", type=click.Choice(MODES))
@click.option("--model", default="demo", show_default=True, help=f"A shape ({', '.join(SHAPES)}) or a checkpoint.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Default: bfloat16 on a GPU, float32 on a CPU.")
@click.option("--tokens", default="8192", show_default=True, help="Prompt lengths, separated by commas.")
@click.option("--batch", default="1", show_default=True, help="Sequences decoded together, separated by commas.")
@click.option(
    "--new_tokens", type=click.IntRange(2, 2**20), default=64, show_default=True, help="New tokens per sequence."
)
@click.option(
    "--method",
    default="vanilla",
    show_default=True,
    help=f"Cache method of a decode or a replay: {', '.join(method_names())}, or a path to a .py file.",
)
@click.option(
    "--methods",
    help="In place of --method: several, separated by commas, or all. One table, a line per method, vanilla first.",
)
@click.option(
    "-o",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the method, or of those of --methods that have it; repeatable.",
)
@click.option(
    "--vary",
    multiple=True,
    metavar="KEY=VALUE,VALUE,..",
    help="Measure every value of an option with the same baselines; repeatable: every combination.",
)
@click.option(
    "--baselines",
    "--peers",
    "baselines",
    help=f"Comma-separated: {', '.join((*BASELINES, *OWN_BASELINES))}, vllm, or none. Default: transformers, and "
    f"vanilla where another method decodes; none with --methods.",
)
@click.option(
    "--vllm_python",
    default=sys.executable,
    show_default="this one",
    help="Python interpreter that can import vllm, for --baselines vllm.",
)
@click.option(
    "--workload",
    type=click.Path(path_type=Path),
    help="Lengths of a replay: a CSV with the columns dataset, prompt_tokens and new_tokens, or the folder of a run.",
)
@click.option("--rows", type=click.IntRange(1, 10**6), default=100, show_default=True, help="Prompts of a replay.")
@click.option(
    "--slots",
    type=click.IntRange(1, 4096),
    default=16,
    show_default=True,
    help="Maximum number of sequences decoded together in a replay.",
)
@click.option(
    "--gpus", type=click.IntRange(1, 1024), default=1, show_default=True, help="GPUs that share the layers in decode."
)
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Workers that share a replay's prompts.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the results as JSON, a plot, and the profile by kernel."
)
@click.option("--profile", "profiled", is_flag=True, help="Also print the kernels of the first decode's steps.")
def main(
    mode: str,
    model: str,
    device: str,
    dtype: str | None,
    tokens: str,
    batch: str,
    new_tokens: int,
    method: str,
    methods: str | None,
    options: tuple[str, ...],
    vary: tuple[str, ...],
    baselines: str | None,
    vllm_python: str,
    workload: Path | None,
    rows: int,
    slots: int,
    gpus: int,
    workers: int,
    out: Path | None,
    profiled: bool,
) -> None:
    """Measure MODE and print time, share of the roofline and speed-up over each baseline."""
    with report_usage_errors():
        names = _baselines(baselines, mode, method, methods is not None)
        workloads = [
            Workload(length, new_tokens, size)
            for size in _numbers("batch", batch)
            for length in _numbers("tokens", tokens)
        ]
        if (largest := max(each.tokens * each.batch for each in workloads)) > _MAX_TOKENS:
            raise UsageError(f"--tokens times --batch is {largest}: at most {_MAX_TOKENS}. Lower one of them.")
        _check(mode, workload, workloads)
        given = option_pairs(options), option_pairs(vary, "--vary")
        if methods is None:
            check_specs(specs := combinations(method, *given))
        else:
            specs = specs_of_methods(methods, *given)
        place = find_device(device)
        if out is not None:
            make_folder(out, "--out")
        dtype = dtype or ("bfloat16" if place.type == "cuda" else "float32")
        if vllm_python != sys.executable and "vllm" not in names:
            raise UsageError("--vllm_python has no effect without --baselines vllm: leave it out.")
        own = [name for name in names if name != "vllm"]
        vllm = Vllm(vllm_python) if "vllm" in names else None
        bench = BenchRun(mode, model, dtype, workloads, own, specs, vllm)
        devices = find_devices(place, gpus, "--gpus")
        stem = None if out is None else out / (bench.name if workers == 1 else f"{bench.name}-{workers}")
        with bench.saved(stem if methods is None else None):
            if mode == "startup":
                from sparsecache.bench.startup import startup

                bench.run(startup(model, device, dtype, workloads[0].tokens, names))
            elif workload is not None and workers > 1:
                check_for_ray()
                from sparsecache.bench.worker_replay import WorkerGroup, replay_by_workers  # imports Ray

                bench.run(replay_by_workers(WorkerGroup(workers, model, dtype, place.type, slots), workload, rows))
            else:
                bench_model = load_bench_model(model, devices, DTYPES[dtype])
                if workload is not None:
                    bench.run_replay(bench_model, sample_requests(workload, rows, bench_model.vocab_size), slots)
                elif methods is not None:
                    bench.run_methods(bench_model, out)
                else:
                    bench.run_each(bench_model)
        if profiled and not bench.failed:
            kernels = out / f"{bench.name}-profile.txt" if out is not None else None
            click.echo(profile_decode(bench_model, workloads[0], specs[0], kernels))
    sys.exit(1 if bench.failed else 0)


def _check(mode: str, workload: Path | None, workloads: list[Workload]) -> None:
    """Raise UsageError for options that a mode does not use, and for a missing one."""
    context = click.get_current_context()
    given = {
        option.name: option.opts[0]
        for option in context.command.params
        if option.name and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    }
    for name, flag in given.items():
        modes = _MODES_OF.get(name, MODES)
        if mode not in modes:
            raise UsageError(f"{flag} has no effect in mode {mode}: leave it out. It is for {' and '.join(modes)}.")
    if "methods" in given and (other := given.keys() & {"method", "profiled"}):
        raise UsageError(f"{given[min(other)]} has no effect with --methods: leave one of them out.")
    if context.params["workers"] > 1 and "baselines" in given:
        raise UsageError("A replay with --workers is compared with one worker: leave out --baselines.")
    if context.params["workers"] > 1 and (method := given.keys() & {"method", "options"}):
        raise UsageError(f"A replay with --workers is of vanilla: leave out {given[min(method)]}.")
    if mode == "replay" and workload is None:
        raise UsageError(
            "A replay needs --workload: the folder of a run, or a CSV with the columns dataset, prompt_tokens and "
            "new_tokens."
        )
    if mode == "startup" and len(workloads) > 1:
        raise UsageError(f"A start-up has one prompt, not {len(workloads)}: give one number of --tokens.")


def _numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--{name} {text!r} must be whole numbers separated by commas.") from error
    if min(numbers) < 1:
        raise UsageError(f"--{name} {text!r} must be numbers of 1 or more.")
    if max(numbers) > _MAX_TOKENS:
        raise UsageError(f"--{name} {short(text)!r} is too large: at most {_MAX_TOKENS}.")
    return numbers


def _baselines(text: str | None, mode: str, method: str, several: bool) -> list[str]:
    if text is None and several:
        return []
    if text is None:
        return ["transformers"] if method == "vanilla" or mode != "decode" else ["vanilla", "transformers"]
    names = [] if text == "none" else [_OLD_NAMES.get(name, name) for name in text.split(",")]
    known = {
        "decode": {*BASELINES, *OWN_BASELINES, "vllm"},
        "replay": {*BASELINES, "vanilla", "vllm"},
        "startup": {"transformers"},
    }
    allowed = known.get(mode, {*BASELINES, "vllm"})
    if len(set(names)) < len(names):
        raise UsageError(f"--baselines {text!r} names a baseline twice: leave one out.")
    if unknown := [name for name in names if name not in allowed]:
        raise UsageError(
            f"--baselines {unknown[0]!r} is not a baseline of mode {mode}. Allowed: {', '.join(sorted(allowed))}, or "
            f"none."
        )
    return names


if __name__ == "__main__":
    main()
