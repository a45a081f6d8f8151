"""Trains the bundled demo checkpoint from scratch, on lessons made as it goes.

Everything is scheduled by the share of --minutes that training has taken, over all runs: a run of --run_minutes stops
there and the next one goes on from its state. On one H200 the defaults take two runs of under ten minutes:

    python examples/train_demo/train.py --out demo --state state.pt    # twice

On a CPU a far smaller model, which learns the form of the answers but not what they are, takes three minutes:

    python examples/train_demo/train.py --tiny --device cpu --workers 1 --batch_tokens 2048 --minutes 3 --out tiny
"""

import json
import math
import multiprocessing
import queue
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lesson_tokenizer import Encoder, train_tokenizer
from lessons import MIX, lesson
from tiny_llama import PADDING, Muon, Size, TinyLlama

_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
NAMES = tuple(MIX)
UNPENALISED = NAMES.index("passage_count")  # counting looks at everything on purpose


@dataclass(frozen=True)
class Stage:
    """From `start` (share of the training time) on: sequence lengths with their weights, and if entropy costs."""

    start: float
    lengths: dict[int, float]
    penalised: bool = False


STAGES = (
    Stage(0.00, {256: 0.3, 512: 0.7}),
    Stage(0.08, {512: 0.4, 1024: 0.6}),
    Stage(0.20, {512: 0.2, 1024: 0.2, 2048: 0.6}),
    Stage(0.38, {512: 0.15, 1024: 0.1, 2048: 0.15, 4096: 0.6}),
    Stage(0.58, {1024: 0.15, 2048: 0.15, 4096: 0.3, 8192: 0.4}),
    Stage(0.70, {1024: 0.1, 2048: 0.15, 4096: 0.35, 8192: 0.2, 9728: 0.2}, penalised=True),
)
TINY_STAGES = (Stage(0.0, {256: 1.0}), Stage(0.7, {256: 0.5, 512: 0.5}, penalised=True))
TINY_SIZE = Size(layers=3, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16)
WINDOW = 32768  # of the exported configuration; what the model was trained to is the longest lesson


@dataclass(frozen=True)
class Plan:
    """What does not change between the runs of one training."""

    size: Size
    stages: tuple[Stage, ...]
    batch_tokens: int
    entropy: float
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    weight_decay: float = 0.05
    ordinary_weight: float = 0.15
    warm_up: float = 0.02
    decay_from: float = 0.45

    def stage(self, share: float) -> int:
        """Index of the stage at this share of the training time."""
        return max(index for index, stage in enumerate(self.stages) if share >= stage.start)

    def rate(self, share: float) -> float:
        """Share of the learning rates: up from nothing, level, then down to nothing."""
        if share < self.warm_up:
            return (share + 1e-4) / self.warm_up
        return min(1.0, max(0.0, (1 - share) / (1 - self.decay_from)))


@dataclass
class Batch:
    """ids [B, S], flags [B, S] and the dataset of each row as an index into NAMES [B]."""

    ids: Tensor
    flags: Tensor
    kinds: Tensor


class Feeder:
    """Processes that make batches for the current stage, and a thread that brings them over."""

    def __init__(self, plan: Plan, tokenizer: Path, workers: int, seed: int, device: torch.device):
        context = multiprocessing.get_context("fork")
        self._stage = context.Value("i", 0)
        self._made: Any = context.Queue(maxsize=max(3, workers // 2))
        self._ready: queue.Queue[Batch] = queue.Queue(maxsize=4)
        self._device = device
        self._processes = [
            context.Process(
                target=_make_batches, args=(plan, tokenizer, f"{seed}/{index}", self._stage, self._made), daemon=True
            )
            for index in range(workers)
        ]
        for process in self._processes:
            process.start()
        threading.Thread(target=self._bring, daemon=True).start()

    def next(self, stage: int) -> Batch:
        """The next batch; from now on batches are made for `stage`."""
        self._stage.value = stage
        return self._ready.get()

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()

    def _bring(self) -> None:
        while True:
            tensors = [torch.from_numpy(array) for array in self._made.get()]
            self._ready.put(
                Batch(*(tensor.pin_memory() if self._device.type == "cuda" else tensor for tensor in tensors))
            )


def _make_batches(plan: Plan, tokenizer: Path, seed: str, stage: Any, made: Any) -> None:
    torch.set_num_threads(1)
    encode = Encoder(tokenizer)
    rng = random.Random(f"lessons/{seed}")
    weights = list(MIX.values())
    number = 0
    while True:
        lengths = plan.stages[stage.value].lengths
        length = rng.choices(list(lengths), list(lengths.values()))[0]
        rows = max(1, plan.batch_tokens // length)
        ids = numpy.full((rows, length), 2, numpy.int32)
        flags = numpy.full((rows, length), PADDING, numpy.uint8)
        kinds = rng.choices(range(len(NAMES)), weights, k=rows)
        for row, kind in enumerate(kinds):
            number += 1
            row_ids, row_flags = lesson(NAMES[kind], length, f"{seed}/{number}", encode)
            ids[row, : len(row_ids)], flags[row, : len(row_ids)] = row_ids, row_flags
        made.put((ids, flags, numpy.array(kinds)))


class Training:
    """The model, its optimisers, and how far they have come."""

    def __init__(self, plan: Plan, device: torch.device, minutes: float, seed: int):
        torch.manual_seed(seed)
        self.plan, self.device, self.minutes = plan, device, minutes
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = TinyLlama(plan.size, compiled=device.type == "cuda").to(device)
        self.muon = Muon(self.model.matrices(), plan.muon_rate, plan.weight_decay)
        self.adam = torch.optim.AdamW(self.model.others(), lr=plan.adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.weights = torch.tensor([plan.ordinary_weight, 1.0, 0.0], device=device)
        self.learned = torch.zeros(2, len(NAMES), device=device)  # taught tokens' losses, and their number
        self.seconds, self.steps, self.tokens = 0.0, 0, 0

    @property
    def share(self) -> float:
        """Share of the training time that has been used."""
        return self.seconds / (60 * self.minutes)

    def step(self, batch: Batch) -> Tensor | None:
        """One update; returns the attention entropy of the penalised rows."""
        ids, flags, kinds = (part.to(self.device, non_blocking=True) for part in (batch.ids, batch.flags, batch.kinds))
        ids = ids.long()
        weights = self.weights[flags.long()]
        weights = torch.cat((weights[:, 1:], torch.zeros_like(weights[:, :1])), 1)
        watched = self.plan.entropy and self.plan.stages[self.plan.stage(self.share)].penalised
        length = ids.shape[1]
        watch = torch.randint(length // 8, length, (16,), device=self.device) if watched else None
        hidden, entropies = self.model.hidden(ids, self.dtype, watch)
        loss, losses = self.model.loss(hidden, ids.roll(-1, 1).flatten(), weights.flatten())
        self.learned[0].index_add_(0, kinds, losses.view_as(weights).sum(1))
        self.learned[1].index_add_(0, kinds, (weights == 1).sum(1).float())
        entropy = None
        if entropies is not None:
            penalised = (kinds != UNPENALISED).float()
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
        """Everything that the next run needs."""
        state = {
            "model": self.model.state_dict(),
            "momenta": self.muon.momenta,
            "adam": self.adam.state_dict(),
            "progress": (self.seconds, self.steps, self.tokens),
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        """Goes on from a saved state."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for mine, saved in zip(self.muon.momenta, state["momenta"], strict=True):
            mine.copy_(saved)
        self.adam.load_state_dict(state["adam"])
        self.seconds, self.steps, self.tokens = state["progress"]


def export(training: Training, tokenizer: Path, folder: Path, max_shard_mib: int) -> None:
    """Writes a LlamaForCausalLM folder in bfloat16."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

    size = training.plan.size
    folder.mkdir(parents=True, exist_ok=True)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=WINDOW,
        rms_norm_eps=size.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype="bfloat16",
    ).save_pretrained(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    for name, shard in _shards(training.model.state_for_transformers(), max_shard_mib * 2**20, folder):
        save_file(shard, folder / name, metadata={"format": "pt"})


def _shards(state: dict[str, Tensor], limit: int, folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    parts: list[dict[str, Tensor]] = [{}]
    for name, tensor in state.items():
        if parts[-1] and sum(t.nbytes for t in parts[-1].values()) + tensor.nbytes > limit:
            parts.append({})
        parts[-1][name] = tensor
    if len(parts) == 1:
        yield "model.safetensors", state
        return
    names = [f"model-{index:05d}-of-{len(parts):05d}.safetensors" for index in range(1, len(parts) + 1)]
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}}
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": weight_map}, indent=1))
    yield from zip(names, parts, strict=True)


def train(training: Training, feeder: Feeder, run_minutes: float) -> None:
    """Steps until the training time or this run's share of it is used up, with a line every ten seconds."""
    training.step(feeder.next(training.plan.stage(training.share)))
    training.learned.sum().item()  # compiling is over, and was not training
    base, began = training.seconds, time.perf_counter()
    reported, reports = began, 0
    while training.share < 1 and training.seconds - base < 60 * run_minutes:
        batch = feeder.next(training.plan.stage(training.share))
        entropy = training.step(batch)
        now = time.perf_counter()
        training.seconds = base + now - began
        if now - reported > 10:
            reported, reports = now, reports + 1
            _report(training, batch, entropy, every_dataset=reports % 4 == 0)


def _report(training: Training, batch: Batch, entropy: Tensor | None, every_dataset: bool) -> None:
    losses, taught = training.learned
    mean = (losses.sum() / taught.sum()).item()
    print(
        f"{training.share:6.1%} step {training.steps} {training.tokens / 1e6:.0f}M tokens "
        f"{tuple(batch.ids.shape)} loss {mean:.4f} rate {training.plan.rate(training.share):.2f}"
        + (f" entropy {entropy.item():.2f}" if entropy is not None else ""),
        flush=True,
    )
    if not math.isfinite(mean):
        raise RuntimeError("The loss is no longer finite.")
    if every_dataset:
        means = zip(NAMES, (losses / taught).tolist(), strict=True)
        print("       " + " ".join(f"{name} {loss:.3f}" for name, loss in means), flush=True)
        training.learned.zero_()


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the exported checkpoint.")
@click.option("--state", type=click.Path(path_type=Path), help="File to go on from, and to save to.")
@click.option("--minutes", type=float, default=13.0, show_default=True, help="Training time over all runs.")
@click.option("--run_minutes", type=float, default=6.5, show_default=True, help="Training time of this run.")
@click.option("--workers", type=int, default=14, show_default=True, help="Processes that make lessons.")
@click.option("--batch_tokens", type=int, default=131072, show_default=True)
@click.option("--entropy", type=float, default=0.01, show_default=True, help="Weight of the attention's entropy.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="A far smaller model and shorter lessons, for a CPU.")
@click.option("--max_shard_mib", type=int, default=32, show_default=True)
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
        print(f"Going on at {training.share:.1%}.")
    feeder = Feeder(plan, tokenizer, workers, seed * 1_000_000 + training.steps, training.device)
    try:
        with sdpa_kernel(_BACKENDS, set_priority=True):
            train(training, feeder, run_minutes)
    finally:
        feeder.close()
    if state is not None:
        training.save(state)
    export(training, tokenizer, out, max_shard_mib)
    progress = {
        "share": training.share,
        "steps": training.steps,
        "tokens": training.tokens,
        "seconds": training.seconds,
    }
    (out / "training.json").write_text(json.dumps({"plan": asdict(plan), "seed": seed, **progress}, indent=1) + "\n")
    print(f"{training.share:.1%} done: {training.steps} steps, {training.tokens / 1e6:.0f}M tokens, in {out}.")


if __name__ == "__main__":
    main()
