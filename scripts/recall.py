"""Measure, per layer, how well InfiniGen's speculated query selects, for each run of a sweep.

    python scripts/recall.py configs/sweeps/infinigen-recall.toml --model MODEL --out tables -- --data ROWS

Every step attends to all tokens, so that all options see the same steps, those of the full cache. What the options
select is only recorded. Each measure is a mean over decode steps and KV heads, then over prompts:

    recall     share of the selection that is among as many tokens of highest true score, joined as in the run
               (with `max` the selection of `oracle`)
    attention  true attention on the selection and the current token
    best       the same on those tokens of highest true score
    tokens     past tokens selected
    kept       share of the past tokens that these are
    overlap    share of the selection that the previous step also selected
    hit N      share of the selection that is among the N last selected tokens (a gpu_cache of N tokens)
"""

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from sweep_predict import predict_in_process
from sweep_runs import SweepRun, check_runs, read_sweep
from torch import Tensor

from sparsecache.cache import CacheConfig, FullCache, LayerCache, ProjectQuery, SequenceStats, StepBytes
from sparsecache.cli import FlexibleCommand, report_usage_errors
from sparsecache.errors import UsageError
from sparsecache.files import write_atomically
from sparsecache.kernels.scores import scaled_scores
from sparsecache.kernels.selection import GroupRule, score_margin, topk_indices
from sparsecache.longbench.records import read_rows
from sparsecache.longbench.tables import Cell, Document, Table, Value, number, records, render, words
from sparsecache.methods.infinigen import InfiniGen
from sparsecache.methods.infinigen.cache import InfiniGenCache
from sparsecache.runner.context import RunContext

CACHES = (16, 32, 64, 128)
MEASURES = ("recall", "attention", "best", "tokens", "kept", "overlap", *(f"hit {tokens}" for tokens in CACHES))
_SHARES = set(MEASURES) - {"tokens"}
_KEY = "selection_measures"  # of a row


class RecordingCache(LayerCache):
    """An InfiniGen cache whose selections are recorded, and a full cache that attends.

    last_selected: [slots, G, T], the step that last selected a token, by its past tokens; -1: none. sums, totals:
    [slots, M] float64; a measure is sum / total.
    """

    graphable = False  # `selected` waits for the device

    def __init__(self, selecting: InfiniGenCache, config: CacheConfig, group: GroupRule) -> None:
        self.speculation_source = selecting.speculation_source
        self._selecting, self._config, self._group = selecting, config, group
        self._full = FullCache(config)
        self._last_selected = config.zeros(config.max_tokens, dtype=torch.int64).fill_(-1)
        self._sums, self._totals = torch.zeros(
            2, config.slots, len(MEASURES), device=config.device, dtype=torch.float64
        )

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._selecting.prefill(slot, q, k, v)
        self._full.prefill(slot, q, k, v)
        self._last_selected[slot] = -1
        self._sums[slot] = self._totals[slot] = 0

    def speculate(self, hidden: Tensor, project_query: ProjectQuery, slots: Tensor) -> None:
        self._selecting.speculate(hidden, project_query, slots)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        past = self._config.seq_lens[slots]
        self._record(q, k, slots, past, _as_mask(self._selecting.selected(), int(past.max())))
        self._selecting.attend(q, k, v, slots)  # stores the token and records the counts
        return self._full.attend(q, k, v, slots)

    def free_slot(self, slot: int) -> None:
        self._selecting.free_slot(slot)

    def step_nbytes(self, seq_len: float, attended: float, cache_hit: float = 0.0) -> StepBytes:
        return self._full.step_nbytes(seq_len, attended)

    def measures(self, slot: int) -> list[float]:
        """Return the measures of a slot, -1 where there is none."""
        means: list[float] = (self._sums[slot] / self._totals[slot]).nan_to_num(nan=-1).tolist()
        return means

    def _record(self, q: Tensor, k: Tensor, slots: Tensor, past: Tensor, selected: Tensor) -> None:
        """Add a step's measures. past: [B]; selected: bool [B, G, T], T the largest of `past`."""
        batch, kv_heads, length = selected.shape
        count, head_dim = selected.sum(2), q.shape[3]
        scores = scaled_scores(q, self._full.keys_of(slots, length), head_dim)[:, :, 0]  # [B, H, T]
        is_past = torch.arange(length, device=q.device) < past[:, None]
        scores = scores.masked_fill(~is_past[:, None], -torch.inf)
        best = _as_mask(topk_indices(score_margin(scores, kv_heads, self._group), count), length)
        current = scaled_scores(q, k, head_dim)[:, :, 0]  # [B, H, 1]
        weights = torch.cat((scores, current), 2).softmax(2).view(batch, kv_heads, -1, length + 1)

        def attention(tokens: Tensor) -> Tensor:
            return ((weights[..., :-1] * tokens[:, :, None]).sum(3) + weights[..., -1]).mean((1, 2))

        last = self._last_selected[slots, :, :length]
        recency = _recency(last)
        one, total = torch.ones(batch, device=q.device), count.sum(1)
        sums_and_totals = [
            (((selected & best).sum(2) / count).mean(1), one),
            (attention(selected), one),
            (attention(best), one),
            (count.float().mean(1), one),
            (count.float().mean(1) / past, one),
            ((selected & (last == past[:, None, None] - 1)).sum((1, 2)), total * (last >= 0).any(2).any(1)),
            *(((selected & (recency < tokens)).sum((1, 2)), total) for tokens in CACHES),
        ]
        self._sums[slots] += torch.stack([measured for measured, _ in sums_and_totals], 1)
        self._totals[slots] += torch.stack([of for _, of in sums_and_totals], 1)
        self._last_selected[slots, :, :length] = torch.where(selected, past[:, None, None], last)


class RecordingInfiniGen(InfiniGen):
    """InfiniGen that records what it selects and attends to everything."""

    def make_cache(self, layer: int, config: CacheConfig) -> LayerCache:
        if layer == 0:
            self._recording: list[RecordingCache] = []
        cache = super().make_cache(layer, config)
        if not isinstance(cache, InfiniGenCache):
            return cache
        self._recording.append(RecordingCache(cache, config, self.group))
        return self._recording[-1]

    def report(self, stats: SequenceStats) -> dict[str, Any]:
        layers = [cache.measures(stats.slot) for cache in self._recording]
        measures = {name: list(values) for name, values in zip(MEASURES, zip(*layers, strict=True), strict=True)}
        return {**super().report(stats), _KEY: measures}


def _as_mask(positions: Tensor, length: int) -> Tensor:
    """Return positions [B, G, N] (-1: none) as a mask [B, G, length]."""
    mask = torch.zeros(*positions.shape[:2], length + 1, device=positions.device, dtype=torch.bool)
    return mask.scatter_(2, positions.masked_fill(positions < 0, length), True)[..., :length]


def _recency(last_selected: Tensor) -> Tensor:
    """Return how many tokens of a KV head were selected later than each of last_selected [B, G, T].

    -1 stands for never; such tokens get more than any number of tokens.
    """
    order = last_selected.sort(dim=2, descending=True, stable=True).indices
    places = torch.arange(order.shape[2], device=order.device).expand_as(order)
    return (
        torch.empty_like(order).scatter_(2, order, places).masked_fill(last_selected < 0, torch.iinfo(order.dtype).max)
    )


class RecordingContext(RunContext):
    """The context of a RecordingInfiniGen run, whose rows cannot be resumed as InfiniGen's."""

    def make_method(self) -> RecordingInfiniGen:
        return RecordingInfiniGen(**self.options)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "method": "infinigen, recorded"}


def recorded_measures(folder: Path) -> dict[str, np.ndarray]:
    """Return each measure of a run's rows with a sparse step: [rows, layers], nan where there is none.

    Raises UsageError for a run without such rows.
    """
    rows = [row for file in sorted(folder.glob("*.jsonl")) for row in read_rows(file) if row.get("sparse_steps")]
    if not rows:
        raise UsageError(f"{folder} has no row with a decode step. Give rows with longer answers.")
    measures = {name: np.array([row[_KEY][name] for row in rows]) for name in MEASURES}
    return {name: np.where(values < 0, np.nan, values) for name, values in measures.items()}


def _mean(values: np.ndarray) -> float | None:
    """Return the mean of the values that are not nan; None if there is none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def document(run_folders: dict[SweepRun, Path]) -> Document:
    """Return a table per measure, with a line per run, and one flat table of all. run_folders: of the predictions."""
    runs, folders = list(run_folders), list(run_folders.values())
    measures_of_runs = [recorded_measures(folder) for folder in folders]
    first = first_sparse_layer(folders[0])
    layers = [f"layer {first + at}" for at in range(next(iter(measures_of_runs[0].values())).shape[1])]
    tables, facts = [], []
    for name in MEASURES:
        lines = []
        for run, measures in zip(runs, measures_of_runs, strict=True):
            values = measures[name] * (100 if name in _SHARES else 1)
            rows = np.array([mean for mean in map(_mean, values) if mean is not None])
            error = float(rows.std(ddof=1) / len(rows) ** 0.5) if len(rows) > 1 else None
            means, mean = [_mean(of_layer) for of_layer in values.T], _mean(rows)
            lines.append([words(run.name), *(number(value, 1) for value in means), _mean_cell(mean, error)])
            fact: dict[str, Value] = {"run": run.name, "measure": name, "rows": len(rows)}
            numbers = {**dict(zip(layers, means, strict=True)), "mean": mean, "error": error}
            facts.append(fact | {key: None if value is None else round(value, 3) for key, value in numbers.items()})
        unit = "%" if name in _SHARES else "tokens"
        tables.append(Table(f"{name}, {unit}", ["run", *layers, "mean"], lines))
    steps = sum(row["sparse_steps"] for file in folders[0].glob("*.jsonl") for row in read_rows(file))
    prompts = len(measures_of_runs[0]["recall"])
    note = f"{prompts} prompts, {steps} decode steps; ± is the standard error of the mean over prompts."
    return Document(tables, records("", facts), notes=[note])


def first_sparse_layer(folder: Path) -> int:
    """Return the first layer that is recorded, by a run's rows."""
    first: int = next(row["dense_layers"] for file in folder.glob("*.jsonl") for row in read_rows(file))
    return first


def _mean_cell(mean: float | None, error: float | None) -> Cell:
    if mean is None or error is None:
        return number(mean, 1)
    return Cell(f"{mean:.1f} ± {error:.1f}", mean)


@click.command(cls=FlexibleCommand)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
@click.option("--model", "models", multiple=True, help="A checkpoint in place of the file's models; repeatable.")
@click.option("--pred_dir", type=click.Path(path_type=Path), default=Path("pred/recall"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the tables as Markdown and CSV.")
def main(file: Path, more: tuple[str, ...], models: tuple[str, ...], pred_dir: Path, out: Path | None) -> None:
    """Record the selections of the infinigen runs that the sweep in FILE names, and print their measures.

    MORE, behind --, are arguments of every run.
    """
    with report_usage_errors():
        runs, arguments = read_sweep(file, models)
        if others := {run.method for run in runs} - {"infinigen"}:
            raise UsageError(f"{file} names {', '.join(sorted(others))}: only infinigen's selections can be recorded.")
        settings = check_runs(runs, [*arguments, *more], pred_dir)
        outcomes = predict_in_process(settings, context_type=RecordingContext)
        if problems := [run for run, outcome in outcomes if outcome.code]:
            raise UsageError(f"Rows failed in {', '.join(map(str, problems))}; see the logs in {pred_dir}/logs.")
        tables = document({run: each.run_folder for run, each in settings.items()})
        click.echo(render(tables, "terminal"))
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            for suffix, form in (("md", "markdown"), ("csv", "csv")):
                write_atomically(out / f"recall.{suffix}", render(tables, form).rstrip("\n") + "\n")


if __name__ == "__main__":
    main()
