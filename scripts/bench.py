r"""Measures our engine beside transformers' generate and the machine's limits, in the same run, on the same prompts.

    python scripts/bench.py decode --model llama-3.1-8b --tokens 8192,32768
    python scripts/bench.py prefill --model llama-3.1-8b --tokens 8192
    python scripts/bench.py replay --model llama-3.1-8b --workload workload.csv --rows 100
    python scripts/bench.py replay --model llama-3.1-8b --workload workload.csv --workers 2
    python scripts/bench.py decode --model llama-3.1-70b --gpus 2 --peers none
    python scripts/bench.py decode --model llama-3.1-8b --tokens 131072 --method infinigen -o budget=0.1 -o alpha=inf \
        --peers vanilla
    python scripts/bench.py decode --model llama-3.1-8b --tokens 32768 --method infinigen -o alpha=inf -o offload=true \
        --vary budget=0.02,0.05,0.1,0.2 --peers offloaded,streamed
    python scripts/bench.py startup --model llama-3.1-8b
    python scripts/bench.py decode --model demo --device cpu --tokens 2048

A named shape has random weights, made on the device; any checkpoint that longbench_pred.py takes can be named too.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import click
from click.core import ParameterSource

from sparsecache.bench.lines import Line, save, save_picture, table
from sparsecache.bench.models import SHAPES, Subject, load_subject
from sparsecache.bench.modes import OWN, PEERS, Job, Way, decode, free_memory, prefill, profile, replay
from sparsecache.cli import FlexibleCommand, make_folder, option_pairs, report_usage_errors
from sparsecache.engine.devices import find_device, find_devices
from sparsecache.engine.loading import DTYPES
from sparsecache.errors import UsageError, one_line, short
from sparsecache.runner.settings import check_for_ray

MODES = ("decode", "prefill", "replay", "startup")
_MEANT_FOR = {
    "tokens": ("decode", "prefill", "startup"),
    "workload": ("replay",),
    "rows": ("replay",),
    "slots": ("replay",),
    "workers": ("replay",),
    **dict.fromkeys(("batch", "new_tokens", "method", "options", "vary", "gpus", "profiled"), ("decode",)),
}
_MAX_TOKENS = 2**26  # of a batch together: beyond the memory of any machine here


@click.command(cls=FlexibleCommand)
@click.argument("mode", type=click.Choice(MODES))
@click.option("--model", default="demo", show_default=True, help=f"A shape ({', '.join(SHAPES)}) or a checkpoint.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="bfloat16 on a GPU, float32 on a CPU, if not given.")
@click.option("--tokens", default="8192", show_default=True, help="Prompt lengths, a comma list.")
@click.option("--batch", default="1", show_default=True, help="Sequences decoded at once, a comma list.")
@click.option("--new_tokens", type=click.IntRange(2, 2**20), default=64, show_default=True)
@click.option("--method", default="vanilla", show_default=True, help="What decodes, in mode decode.")
@click.option("-o", "options", multiple=True, metavar="KEY=VALUE", help="An option of the method; repeatable.")
@click.option(
    "--vary",
    multiple=True,
    metavar="KEY=VALUE,VALUE,..",
    help="Measure each of an option's values, beside the same peers; repeatable: all combinations.",
)
@click.option(
    "--peers", default="transformers", show_default=True, help=f"Comma list of {', '.join((*PEERS, *OWN))}, or none."
)
@click.option("--workload", type=click.Path(path_type=Path), help="Of a replay: dataset, prompt_tokens, new_tokens.")
@click.option("--rows", type=click.IntRange(1, 10**6), default=100, show_default=True, help="Prompts of a replay.")
@click.option("--slots", type=click.IntRange(1, 4096), default=16, show_default=True, help="Most at once in a replay.")
@click.option(
    "--gpus", type=click.IntRange(1, 1024), default=1, show_default=True, help="GPUs that share the layers, in decode."
)
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="GPUs or CPUs that share a replay's prompts.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the lines as JSON and a picture, and a profile."
)
@click.option(
    "--profile",
    "profiled",
    is_flag=True,
    help="Also tell the stages that the time of the first decode goes to; --out has them by kernel.",
)
def main(
    mode: str,
    model: str,
    device: str,
    dtype: str | None,
    tokens: str,
    batch: str,
    new_tokens: int,
    method: str,
    options: tuple[str, ...],
    vary: tuple[str, ...],
    peers: str,
    workload: Path | None,
    rows: int,
    slots: int,
    gpus: int,
    workers: int,
    out: Path | None,
    profiled: bool,
) -> None:
    """Measure MODE and print each line as time, share of the limit and ratio to each peer."""
    with report_usage_errors():
        names = _peers(peers, mode)
        jobs = [
            Job(length, new_tokens, size) for size in _numbers("batch", batch) for length in _numbers("tokens", tokens)
        ]
        if (largest := max(job.tokens * job.batch for job in jobs)) > _MAX_TOKENS:
            raise UsageError(f"--tokens times --batch is {largest}: at most {_MAX_TOKENS}. Lower one of them.")
        _check(mode, workload, jobs)
        ways = _ways(method, option_pairs(options), option_pairs(vary, "--vary"))
        where = find_device(device)
        if out is not None:
            make_folder(out, "--out")
        dtype = dtype or ("bfloat16" if where.type == "cuda" else "float32")
        bench = _Bench(mode, model, dtype, jobs, names, ways)
        devices = find_devices(where, gpus, "--gpus")
        with bench.saved(None if out is None else out / (bench.name if workers == 1 else f"{bench.name}-{workers}")):
            if mode == "startup":
                from sparsecache.bench.startup import startup

                bench.take(startup(model, device, dtype, jobs[0].tokens, names))
            elif workload is not None and workers > 1:
                check_for_ray()
                from sparsecache.bench.many import Crew, replay_by_many  # only where it is asked for: it imports Ray

                bench.take(replay_by_many(Crew(workers, model, dtype, where.type, slots), workload, rows))
            else:
                subject = load_subject(model, devices, DTYPES[dtype])
                if workload is not None:
                    bench.take(replay(subject, workload, rows, slots, names))
                else:
                    bench.take_each(subject)
        if profiled and not bench.failed:
            kernels = out / f"{bench.name}-profile.txt" if out is not None else None
            click.echo(profile(subject, jobs[0], kernels, ways[0]))
    sys.exit(1 if bench.failed else 0)


@dataclass
class _Bench:
    """What is asked for, and the lines so far."""

    mode: str
    model: str
    dtype: str
    jobs: list[Job]
    peers: list[str]
    ways: list[Way]

    def __post_init__(self) -> None:
        self.name = f"{self.mode}-{Path(self.model).name}"
        self.lines: list[Line] = []
        self.failed = False

    def take(self, measured: Iterator[Line], what: str = "it") -> None:
        """Prints and keeps each line as it comes; a failure is told, and the lines before it stay."""
        try:
            for line in measured:
                self.lines.append(line)
                click.echo(table([line]).strip("\n"))
        except RuntimeError as error:  # OutOfMemoryError is one
            click.echo(f"{self.mode}: {what} was not measured to its end: {one_line(error)}", err=True)
            self.failed = True
        free_memory()

    def take_each(self, subject: Subject) -> None:
        """Each job's lines."""
        for job in self.jobs:
            what = f"{job.tokens} tokens, batch {job.batch},"
            if self.mode == "decode":
                self.take(decode(subject, [job], self.peers, self.ways), what)
            else:
                self.take(prefill(subject, [job], self.peers), what)

    @contextmanager
    def saved(self, stem: Path | None) -> Iterator[None]:
        """Writes what is measured within as JSON and, where matplotlib is installed, as a picture: if stopped, too."""
        stopped = True
        try:
            yield
            stopped = False
        finally:
            if stem is not None and (self.lines or not stopped):
                ways = ", ".join(map(str, self.ways))
                save(self.lines, Path(f"{stem}.json"), model=self.model, dtype=self.dtype, method=ways)
            if stem is not None and self.lines:
                save_picture(self.lines, Path(f"{stem}.svg"))


def _check(mode: str, workload: Path | None, jobs: list[Job]) -> None:
    """Raises UsageError for options that say nothing in a mode, and for what a mode needs."""
    context = click.get_current_context()
    given = {
        option.name: option.opts[0]
        for option in context.command.params
        if option.name and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    }
    for name, flag in given.items():
        modes = _MEANT_FOR.get(name, MODES)
        if mode not in modes:
            raise UsageError(f"{flag} says nothing in mode {mode}: leave it out. It is for {' and '.join(modes)}.")
    if context.params["workers"] > 1 and "peers" in given:
        raise UsageError("A replay that workers share is compared with one of them alone: leave out --peers.")
    if mode == "replay" and workload is None:
        raise UsageError("A replay needs --workload: a CSV with the columns dataset, prompt_tokens, new_tokens.")
    if mode == "startup" and len(jobs) > 1:
        raise UsageError(f"A start-up ends with one prompt, not {len(jobs)}: give one number of --tokens.")


def _ways(method: str, options: dict[str, str], varied: dict[str, str]) -> list[Way]:
    """A method with its options and every combination of the values, comma lists, of those that vary."""
    if both := options.keys() & varied.keys():
        raise UsageError(f"{min(both)} is given by -o and by --vary: leave one of them out.")
    values = [text.split(",") for text in varied.values()]
    ways = [Way(method, {**options, **dict(zip(varied, chosen, strict=True))}) for chosen in product(*values)]
    for way in ways:
        way.parsed()
    return ways


def _numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--{name} {text!r} is no comma list of whole numbers.") from error
    if min(numbers) < 1:
        raise UsageError(f"--{name} {text!r} must hold numbers from 1 on.")
    if max(numbers) > _MAX_TOKENS:
        raise UsageError(f"--{name} {short(text)!r} is too large: at most {_MAX_TOKENS}.")
    return numbers


def _peers(text: str, mode: str) -> list[str]:
    names = [] if text == "none" else text.split(",")
    known = {"decode": {*PEERS, *OWN}, "startup": {"transformers"}}.get(mode, {*PEERS})
    if len(set(names)) < len(names):
        raise UsageError(f"--peers {text!r} names one twice: leave one of them out.")
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--peers {unknown[0]!r} is no peer in {mode}. Peers: {', '.join(sorted(known))}, or none.")
    return names


if __name__ == "__main__":
    main()
