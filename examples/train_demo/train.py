"""Trains the bundled demo checkpoint from scratch on lessons that are generated during training.

The schedule follows the share of --minutes that training has taken, summed over all runs. A run stops after
--run_minutes, and the next run continues from its --state. On one H200 the defaults take two runs of under ten minutes:

    python examples/train_demo/train.py --out demo --state state.pt    # twice

On a CPU, a much smaller model takes three minutes. It learns the form of the answers, not the answers:

    python examples/train_demo/train.py --tiny --device cpu --workers 1 --batch_tokens 2048 --minutes 3 --out tiny
"""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import click
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from batches import DATASETS, STAGES, TINY_STAGES, Batch, BatchLoader, Plan
from export import export
from lesson_tokenizer import train_tokenizer
from tiny_llama import Muon, Size, TinyLlama

TINY_SIZE = Size(layers=3, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16)
_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
_UNPENALISED = DATASETS.index("passage_count")  # counting needs attention to all paragraphs
_QUERIES = 16  # random positions per sequence whose attention entropy is penalised
_REPORT_SECONDS = 10


class Training:
    """The model, its optimizers, and the progress of training."""

    def __init__(self, plan: Plan, device: torch.device, minutes: float, seed: int):
        torch.manual_seed(seed)
        self.plan, self.device, self.minutes = plan, device, minutes
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = TinyLlama(plan.size, compiled=device.type == "cuda").to(device)
        self.muon = Muon(self.model.matrices(), plan.muon_rate, plan.weight_decay)
        self.adam = torch.optim.AdamW(self.model.others(), lr=plan.adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.weights = torch.tensor([plan.ordinary_weight, 1.0, 0.0], device=device)
        self.losses = torch.zeros(2, len(DATASETS), device=device)  # loss sum and number of predictable tokens
        self.seconds, self.steps, self.tokens = 0.0, 0, 0

    @property
    def share(self) -> float:
        """The share of the training time used so far."""
        return self.seconds / (60 * self.minutes)

    def step(self, batch: Batch) -> Tensor | None:
        """One update. Returns the attention entropy of the penalised rows, in nats, or None."""
        ids, flags, kinds = (part.to(self.device, non_blocking=True) for part in (batch.ids, batch.flags, batch.kinds))
        ids = ids.long()
        weights = self.weights[flags.long()]
        weights = torch.cat((weights[:, 1:], torch.zeros_like(weights[:, :1])), 1)
        penalise = self.plan.entropy and self.plan.stages[self.plan.stage(self.share)].penalised
        length = ids.shape[1]
        queries = torch.randint(length // 8, length, (_QUERIES,), device=self.device) if penalise else None
        hidden, entropies = self.model.hidden(ids, self.dtype, queries)
        loss, losses = self.model.loss(hidden, ids.roll(-1, 1).flatten(), weights.flatten())
        self.losses[0].index_add_(0, kinds, losses.view_as(weights).sum(1))
        self.losses[1].index_add_(0, kinds, (weights == 1).sum(1).float())
        entropy = None
        if entropies is not None:
            penalised = (kinds != _UNPENALISED).float()
            entropy = (entropies * penalised).sum() / penalised.sum().clamp(min=1)
            loss = loss + self.plan.entropy * entropy
        loss.backward()
        self._update()
        self.steps += 1
        self.tokens += ids.numel()
        return entropy.detach() if entropy is not None else None

    def _update(self) -> None:
        rate = self.plan.rate(self.share)
        self.muon.step(rate, min(0.95, 0.85 + 0.1 * self.steps / 300))
        torch.nn.utils.clip_grad_norm_(self.model.others(), 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.plan.adam_rate * rate
        self.adam.step()
        self.model.zero_grad(set_to_none=True)

    def save(self, path: Path) -> None:
        """Save the state that the next run continues from."""
        state = {
            "model": self.model.state_dict(),
            "momenta": self.muon.momenta,
            "adam": self.adam.state_dict(),
            "progress": (self.seconds, self.steps, self.tokens),
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        """Restore a saved state."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for momentum, saved in zip(self.muon.momenta, state["momenta"], strict=True):
            momentum.copy_(saved)
        self.adam.load_state_dict(state["adam"])
        self.seconds, self.steps, self.tokens = state["progress"]


def train(training: Training, loader: BatchLoader, run_minutes: float) -> None:
    """Train until --minutes or --run_minutes are used up; print a line every ten seconds."""
    training.step(loader.next(training.plan.stage(training.share)))
    training.losses.sum().item()  # wait: the first step compiles and is not counted
    previous, started = training.seconds, time.perf_counter()
    reported, reports = started, 0
    while training.share < 1 and training.seconds - previous < 60 * run_minutes:
        batch = loader.next(training.plan.stage(training.share))
        entropy = training.step(batch)
        now = time.perf_counter()
        training.seconds = previous + now - started
        if now - reported > _REPORT_SECONDS:
            reported, reports = now, reports + 1
            _report(training, batch, entropy, every_dataset=reports % 4 == 0)


def _report(training: Training, batch: Batch, entropy: Tensor | None, every_dataset: bool) -> None:
    losses, counts = training.losses
    mean = (losses.sum() / counts.sum()).item()
    print(
        f"{training.share:6.1%} step {training.steps} {training.tokens / 1e6:.0f}M tokens "
        f"{tuple(batch.ids.shape)} loss {mean:.4f} rate {training.plan.rate(training.share):.2f}"
        + (f" entropy {entropy.item():.2f}" if entropy is not None else ""),
        flush=True,
    )
    if not math.isfinite(mean):
        raise RuntimeError("The loss is not finite.")
    if every_dataset:
        means = zip(DATASETS, (losses / counts).tolist(), strict=True)
        print("       " + " ".join(f"{name} {loss:.3f}" for name, loss in means), flush=True)
        training.losses.zero_()


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the exported checkpoint.")
@click.option("--state", type=click.Path(path_type=Path), help="File to continue from and to save to.")
@click.option("--minutes", type=float, default=13.0, show_default=True, help="Training time over all runs.")
@click.option("--run_minutes", type=float, default=6.5, show_default=True, help="Training time of this run.")
@click.option("--workers", type=int, default=14, show_default=True, help="Processes that generate lessons.")
@click.option("--batch_tokens", type=int, default=131072, show_default=True, help="Tokens per batch.")
@click.option(
    "--entropy", type=float, default=0.01, show_default=True, help="Weight of the attention entropy in the loss."
)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="Train a much smaller model on shorter lessons, for a CPU.")
@click.option("--max_shard_mib", type=int, default=32, show_default=True, help="MiB per weight file.")
def main(
    out: Path,
    state: Path | None,
    minutes: float,
    run_minutes: float,
    workers: int,
    batch_tokens: int,
    entropy: float,
    seed: int,
    device: str,
    tiny: bool,
    max_shard_mib: int,
) -> None:
    """Train the demo checkpoint and export it to --out."""
    plan = Plan(TINY_SIZE if tiny else Size(), TINY_STAGES if tiny else STAGES, batch_tokens, entropy)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = out / "tokenizer.json"
    if not tokenizer.exists():
        train_tokenizer(plan.size.vocabulary).save(str(tokenizer))
    training = Training(plan, torch.device(device), minutes, seed)
    if state is not None and state.exists():
        training.load(state)
        print(f"Continuing at {training.share:.1%}.")
    loader = BatchLoader(plan, tokenizer, workers, seed * 1_000_000 + training.steps, training.device)
    try:
        with sdpa_kernel(_BACKENDS, set_priority=True):
            train(training, loader, run_minutes)
    finally:
        loader.close()
    if state is not None:
        training.save(state)
    export(training.model, tokenizer, out, max_shard_mib)
    progress = {
        "share": training.share,
        "steps": training.steps,
        "tokens": training.tokens,
        "seconds": training.seconds,
    }
    (out / "training.json").write_text(json.dumps({"plan": asdict(plan), "seed": seed, **progress}, indent=1) + "\n")
    print(f"{training.share:.1%} done: {training.steps} steps, {training.tokens / 1e6:.0f}M tokens. Written to {out}.")


if __name__ == "__main__":
    main()
