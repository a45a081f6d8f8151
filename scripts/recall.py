"""How well InfiniGen's guess finds the tokens that the true query would, layer by layer, for each run of a sweep.

The runs are watched, not followed: at every step all tokens are attended to, so that all options see the same steps,
those of the full cache. Each measure is a mean over a prompt's decode steps and KV heads, and then over prompts:

    recall     share of the selection that is among as many tokens of highest true score (what `oracle` would take)
    attention  true attention on the selection and the current token
    best       the same for those tokens of highest true score
    tokens     past tokens selected
    kept       share of the past tokens that these are
    overlap    share of the selection that was in the step before's
    hit N      share of the selection that is among the N last selected tokens: a gpu_cache of N tokens
"""

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from sweep_runs import Run, check_runs, read_sweep
from sweep_shared import SharedContext, predict_all
from torch import Tensor

from sparsecache.cli import report_usage_errors
from sparsecache.errors import UsageError
from sparsecache.files import write_atomically
from sparsecache.kernels.scores import scaled_scores
from sparsecache.kernels.selection import distance_to_best, highest
from sparsecache.longbench.records import read_rows
from sparsecache.longbench.tables import Cell, Document, Table, Value, number, records, render, words
from sparsecache.methods._cache import FullCache
from sparsecache.methods.infinigen import InfiniGen

CACHES = (16, 32, 64, 128)
MEASURES = ("recall", "attention", "best", "tokens", "kept", "overlap", *(f"hit {tokens}" for tokens in CACHES))
_SHARES = set(MEASURES) - {"tokens"}


class Watched(InfiniGen):
    """InfiniGen that notes what it selects and attends to everything."""

    def make_room(self, layers: int, slots: int, max_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        super().make_room(layers, slots, max_tokens, device, dtype)
        self._all = FullCache(self.devices, slots, max_tokens, self.shape, dtype)
        self._used = torch.full((layers, slots, self.shape.kv_heads, max_tokens), -1, device=device)
        self._sums = torch.zeros(layers, slots, len(MEASURES), device=device, dtype=torch.float64)
        self._totals = torch.zeros_like(self._sums)  # what each sum is to be divided by

    def take_prompt(self, layer: int, slot: int, q: Tensor, k: Tensor, v: Tensor, max_new_tokens: int) -> None:
        super().take_prompt(layer, slot, q, k, v, max_new_tokens)
        self._all.fill(layer, slot, k, v)
        self._used[layer, slot] = -1
        self._sums[layer, slot] = self._totals[layer, slot] = 0

    def attend_past(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, past: Tensor, cap: Tensor
    ) -> tuple[Tensor, Tensor]:
        self._watch(layer, q, k, slots, past, _as_mask(self._selected[layer], int(past.max())))
        _, attended = super().attend_past(layer, q, k, v, slots, past, cap)
        return self._all.attend(layer, q, k, v, slots), attended

    def _watch(self, layer: int, q: Tensor, k: Tensor, slots: Tensor, past: Tensor, chosen: Tensor) -> None:
        """Notes a step that chose `chosen` [B, G, T]."""
        batch, kv_heads, length = chosen.shape
        count = chosen.sum(2)
        scores = scaled_scores(q, self._all.keys[layer, slots, :, :length], self.shape.head_dim)[:, :, 0]
        unseen = torch.arange(length, device=q.device) >= past[:, None]
        scores = scores.masked_fill(unseen[:, None], -torch.inf)
        best = _as_mask(highest(distance_to_best(scores, kv_heads), count), length)
        current = scaled_scores(q, k, self.shape.head_dim)[:, :, 0]  # [B, H, 1]
        weights = torch.cat((scores, current), 2).softmax(2).view(batch, kv_heads, -1, length + 1)

        def attention(tokens: Tensor) -> Tensor:
            return ((weights[..., :-1] * tokens[:, :, None]).sum(3) + weights[..., -1]).mean((1, 2))

        used = self._used[layer, slots, :, :length]
        one, selected = torch.ones(batch, device=q.device), count.sum(1)
        noted = [
            (((chosen & best).sum(2) / count).mean(1), one),
            (attention(chosen), one),
            (attention(best), one),
            (count.float().mean(1), one),
            (count.float().mean(1) / past, one),
            ((chosen & (used == past[:, None, None] - 1)).sum((1, 2)), selected * (used >= 0).any(2).any(1)),
            *(((chosen & _latest(used, tokens)).sum((1, 2)), selected) for tokens in CACHES),
        ]
        self._sums[layer, slots] += torch.stack([amount for amount, _ in noted], 1)
        self._totals[layer, slots] += torch.stack([total for _, total in noted], 1)
        self._used[layer, slots, :, :length] = torch.where(chosen, past[:, None, None], used)

    def report(self, slot: int) -> dict[str, Any]:
        means = (self._sums[:, slot] / self._totals[:, slot]).T.nan_to_num(nan=-1)  # [M, layers]
        watched = {name: row.tolist() for name, row in zip(MEASURES, means, strict=True)}
        return {**super().report(slot), "watched": watched}


def _as_mask(positions: Tensor, length: int) -> Tensor:
    """Positions [B, G, N] (-1: none) as a mask [B, G, length]."""
    mask = torch.zeros(*positions.shape[:2], length + 1, device=positions.device, dtype=torch.bool)
    return mask.scatter_(2, positions.masked_fill(positions < 0, length), True)[..., :length]


def _latest(used: Tensor, tokens: int) -> Tensor:
    """The `tokens` most recently used of each KV head, as a mask like used [B, G, T] (-1: never)."""
    order = used.sort(dim=2, descending=True, stable=True).indices[..., :tokens]
    return torch.zeros_like(used, dtype=torch.bool).scatter_(2, order, True) & (used >= 0)


class WatchedContext(SharedContext):
    """A plan of Watched, whose rows are in no file of InfiniGen's own."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.method = Watched(**self.options)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "method": "infinigen, watched"}


def watched_rows(folder: Path) -> dict[str, np.ndarray]:
    """Each measure of a run's rows with a sparse step: [rows, layers], nan where it has none."""
    rows = [row for file in sorted(folder.glob("*.jsonl")) for row in read_rows(file) if row.get("sparse_steps")]
    found = {name: np.array([row["watched"][name] for row in rows]) for name in MEASURES}
    return {name: np.where(values < 0, np.nan, values) for name, values in found.items()}


def document(runs: list[Run], pred_dir: Path) -> Document:
    """A table for each measure, a line a run, and all of it as one flat table."""
    folders = [pred_dir / Path(run.model).name / run.name for run in runs]
    found = [watched_rows(folder) for folder in folders]
    first = read_first_layer(folders[0])
    layers = [f"layer {first + at}" for at in range(next(iter(found[0].values())).shape[1])]
    tables, facts = [], []
    for name in MEASURES:
        lines = []
        for run, measures in zip(runs, found, strict=True):
            values = measures[name] * (100 if name in _SHARES else 1)
            rows = np.nanmean(values, 1)
            rows = rows[~np.isnan(rows)]
            error = float(rows.std(ddof=1) / len(rows) ** 0.5) if len(rows) > 1 else None
            means, mean = np.nanmean(values, 0).tolist(), float(rows.mean())
            lines.append([words(run.name), *(number(value, 1) for value in means), _mean(mean, error)])
            fact: dict[str, Value] = {"run": run.name, "measure": name, "rows": len(rows)}
            numbers = {**dict(zip(layers, means, strict=True)), "mean": mean, "error": error}
            facts.append(fact | {key: None if value is None else round(value, 3) for key, value in numbers.items()})
        unit = "%" if name in _SHARES else "tokens"
        tables.append(Table(f"{name}, {unit}", ["run", *layers, "mean"], lines))
    steps = sum(row["sparse_steps"] for file in folders[0].glob("*.jsonl") for row in read_rows(file))
    note = f"{len(found[0]['recall'])} prompts, {steps} decode steps; ± is the standard error of the mean over prompts."
    return Document(tables, records("", facts), notes=[note])


def read_first_layer(folder: Path) -> int:
    """The first layer that is watched, as the run's rows say."""
    first: int = next(row["dense_layers"] for file in folder.glob("*.jsonl") for row in read_rows(file))
    return first


def _mean(mean: float, error: float | None) -> Cell:
    return Cell(f"{mean:.1f}" + ("" if error is None else f" ± {error:.1f}"), mean)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--pred_dir", type=click.Path(path_type=Path), default=Path("pred/recall"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the tables as Markdown and CSV.")
def main(file: Path, pred_dir: Path, out: Path | None) -> None:
    """Watch the runs of infinigen that the sweep in FILE names, and print what their guesses find."""
    with report_usage_errors():
        runs, arguments = read_sweep(file)
        if others := {run.method for run in runs} - {"infinigen"}:
            raise UsageError(f"{file} names {', '.join(sorted(others))}; only runs of infinigen can be watched.")
        failed, incomplete = predict_all(check_runs(runs, arguments, pred_dir), WatchedContext)
        if problems := [*failed, *incomplete]:
            raise UsageError(f"Rows failed in {', '.join(map(str, problems))}; see the logs in {pred_dir}/logs.")
        shown = document(runs, pred_dir)
        click.echo(render(shown, "terminal"))
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            for suffix, form in (("md", "markdown"), ("csv", "csv")):
                write_atomically(out / f"recall.{suffix}", render(shown, form).rstrip("\n") + "\n")


if __name__ == "__main__":
    main()
