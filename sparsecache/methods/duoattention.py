"""DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads (ICLR'25, arXiv 2410.10819).

Retrieval heads keep every token. Streaming heads keep the first `sinks` tokens and the `recent` last ones. Each KV head
has a gate from 0 to 1. The share `sparsity` of all KV heads of the model, those with the lowest gates, are streaming
heads.

GQA: a gate belongs to a KV head, as in the paper.

Gates: the paper learns them per model. `gates` names a file of them in the authors' format, full_attention_heads.tsv: a
line per layer, a number per KV head, separated by tabs. Without a file, gates are estimated from the calibration text,
which is not in the paper. A gate is then the share of the last 256 queries' attention that is neither on the first 128
tokens nor on the last 256, whatever the options `sinks` and `recent` are.

Differences: the prompt's attention is dense; the paper's streaming heads have their pattern there too. There is no
budget and there are no dense layers: layers without a streaming head keep and attend to everything, and count in
`kept`. Defaults are those of the authors' LongBench runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig, CacheMethod, LayerCache, MethodKind, Shape, StepBytes
from sparsecache.cache.calibration import read_calibration_text
from sparsecache.cache.checks import check_token_counts
from sparsecache.cache.full import FullCache
from sparsecache.cache.stats import SequenceStats
from sparsecache.errors import UsageError
from sparsecache.files import read_file
from sparsecache.kernels.decode import attend_and_append
from sparsecache.kernels.scores import scaled_scores
from sparsecache.options import FilePath

_GATE_SINKS, _GATE_RECENT = 128, 256  # tokens whose attention does not count in an estimated gate
_GATE_QUERIES = 256  # last queries whose attention is averaged in an estimated gate
_MAX_BYTES = 2**24  # of a file of gates
_BLOCK = 64  # queries whose attention is held at a time
_SLACK = 0.01  # the authors' gates reach 0.0014 below 0


@dataclass
class DuoAttention(CacheMethod):
    """Keeps everything in retrieval heads, the first and the last tokens in streaming heads."""

    kind: ClassVar[MethodKind] = "eviction"
    absent_options: ClassVar[Mapping[str, str]] = {
        "storage": "in streaming heads the current token takes the row of an old one, but keys are quantised in groups "
        "of neighbours. Use kivi, or a method that evicts once, such as snapkv."
    }
    prompt_queries = 0

    gates: Annotated[FilePath | None, "file of gates: a line per layer, tabs between KV heads; none: estimated"] = None
    sparsity: Annotated[float, "share of the KV heads that are streaming heads, 0 to 1"] = 0.5
    sinks: Annotated[int, "first tokens that streaming heads keep, 0 or more"] = 64
    recent: Annotated[int, "last tokens that streaming heads keep, 1 or more"] = 256
    calibration_file: Annotated[FilePath | None, "text file that gates are estimated from; none: bundled"] = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity={self.sparsity} must be a share from 0 to 1.")
        check_token_counts(sinks=self.sinks)
        if self.recent < 1:
            raise ValueError(f"recent={self.recent} must be 1 token or more.")
        self._gates = [] if self.gates is None else _read_gates(self.gates)

    def check(self, shape: Shape) -> None:
        found = [len(of_layer) for of_layer in self._gates]
        if self.gates is not None and found != [shape.kv_heads] * shape.layers:
            numbers = " or ".join(map(str, sorted(set(found)))) or "0"
            raise ValueError(
                f"gates={self.gates} has {len(found)} lines of {numbers} numbers. "
                f"This model needs {shape.layers} lines, one per layer, of {shape.kv_heads} numbers, one per KV head."
            )

    def calibration_text(self) -> str | None:
        return read_calibration_text(self.calibration_file) if self.gates is None else None

    def calibrate(self, layer: int, q: Tensor, k: Tensor) -> None:
        self._gates[layer:] = [estimated_gates(q, k).cpu()]

    def calibration(self) -> dict[str, Tensor]:
        return {"gates": torch.stack(self._gates)}

    def restore(self, calibration: dict[str, Tensor], shape: Shape) -> None:
        found, expected = calibration.get("gates"), (shape.layers, shape.kv_heads)
        if found is None or tuple(found.shape) != expected or not bool(found.isfinite().all()):
            raise ValueError(f"its gates must be {expected[0]} x {expected[1]} finite numbers for this model.")
        self._gates = list(found)

    def streaming_heads(self, shape: Shape) -> Tensor:
        """Return which KV heads are streaming heads: bool [layers, G]. Of equal gates the first are."""
        if len(self._gates) != shape.layers:
            raise RuntimeError("The method must be calibrated before it takes a prompt.")
        gates = torch.stack(self._gates)
        order = gates.flatten().argsort(stable=True)[: round(self.sparsity * gates.numel())]
        return torch.zeros(gates.numel(), dtype=torch.bool).index_fill_(0, order, True).view_as(gates)

    def make_cache(self, layer: int, config: CacheConfig) -> LayerCache:
        is_streaming = self.streaming_heads(config.shape)
        if not is_streaming.any():
            return FullCache(config)
        return DuoAttentionCache(is_streaming[layer], self.sinks, self.recent, config)

    def report(self, stats: SequenceStats) -> dict[str, Any]:
        sparse = stats.sparse_layers > 0
        longer = stats.prompt_tokens + stats.steps - 1 - (self.sinks + self.recent)  # than streaming heads keep
        return {
            "kept": stats.kept,
            "sparse_steps": stats.steps if sparse else 0,
            "capped_steps": max(0, min(stats.steps, longer)) if sparse else 0,
            "dense_layers": stats.dense_layers,
        }


class DuoAttentionCache(LayerCache):
    """All tokens of retrieval heads, and the sinks and a ring of recent tokens of streaming heads.

    retrieval, streaming: the indices of the KV heads of each kind, R and S of them. full_keys, full_values: [slots, R,
    max_tokens, D]. keys, values: [slots, S, sinks + recent + 1, D], the last row for the current token.
    """

    def __init__(self, is_streaming: Tensor, sinks: int, recent: int, config: CacheConfig) -> None:
        """is_streaming: bool [G], on the host."""
        self.config, self.seq_lens, self.stats = config, config.seq_lens, config.stats
        self._sinks, self._recent = sinks, recent
        self._size = min(sinks + recent, config.max_tokens)
        self.retrieval, self.streaming = (
            which.nonzero().flatten().to(config.device) for which in (~is_streaming, is_streaming)
        )
        self._back = torch.cat((self.retrieval, self.streaming)).argsort()
        self._limits = torch.where(is_streaming, self._size, config.max_tokens).to(config.device)
        self.keys, self.values = self._zeros(self.streaming, min(self._size + 1, config.max_tokens))
        self.full_keys, self.full_values = self._zeros(self.retrieval, config.max_tokens)

    def _zeros(self, heads: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Return keys and values for some KV heads."""
        config = self.config
        size = (config.slots, len(heads), rows, config.shape.head_dim)
        keys, values = (torch.zeros(size, dtype=config.dtype, device=config.device) for _ in range(2))
        return keys, values

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        length = k.shape[1]
        kept = torch.arange(length, device=k.device)
        if length > self._size:
            kept = torch.cat((kept[: self._sinks], kept[length - self._recent :]))
        for x, full, ring in ((k, self.full_keys, self.keys), (v, self.full_values, self.values)):
            full[slot, :, :length] = x[self.retrieval]
            if len(self.streaming):
                ring[slot][:, self._ring_rows(kept)] = x[self.streaming][:, kept]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        past = self.seq_lens[slots].clamp(max=self.config.max_tokens - 1)
        self.stats.record(torch.minimum(past[:, None], self._limits), slots)
        grouped = q.view(len(slots), k.shape[1], -1, q.shape[3])  # [B, G, H / G, D]
        lengths = self.seq_lens.clamp(max=self._size)
        parts = []
        if len(self.retrieval):
            arguments = _heads(self.retrieval, grouped, k, v)
            parts.append(attend_and_append(*arguments, self.full_keys, self.full_values, self.seq_lens, slots))
        if len(self.streaming):
            q, k, v = _heads(self.streaming, grouped, k, v)
            parts.append(attend_and_append(q, k, v, self.keys, self.values, lengths, slots))
            row = self._ring_rows(past)
            self.keys[slots, :, row], self.values[slots, :, row] = k[:, :, 0], v[:, :, 0]
        out = torch.cat([part.view(len(slots), -1, *grouped.shape[2:]) for part in parts], 1)
        return out[:, self._back].view(len(slots), -1, 1, grouped.shape[3])

    def _ring_rows(self, positions: Tensor) -> Tensor:
        """Return the rows of positions in the cache of streaming heads."""
        return torch.where(positions < self._sinks, positions, self._sinks + (positions - self._sinks) % self._recent)

    def step_nbytes(self, seq_len: float, attended: float, cache_hit: float = 0.0) -> StepBytes:
        return StepBytes(attended * self.config.token_nbytes)


def estimated_gates(q: Tensor, k: Tensor) -> Tensor:
    """Return the share of attention that is neither on the first nor on recent tokens: [G] float32.

    q: [G, H / G, L, D]; k: [G, L, D]. The mean over the last queries and a KV head's query heads. A short text has
    fewer first and recent tokens.
    """
    kv_heads, length, head_dim = k.shape
    sinks, recent = min(_GATE_SINKS, length // 8), min(_GATE_RECENT, length // 4)
    first = max(0, length - _GATE_QUERIES)
    shares = torch.zeros(kv_heads, device=k.device)
    for start in range(first, length, _BLOCK):
        block = q[:, :, start : start + _BLOCK].reshape(-1, min(_BLOCK, length - start), head_dim)
        at = torch.arange(start, start + block.shape[1], device=k.device)[:, None]
        position = torch.arange(length, device=k.device)
        attention = scaled_scores(block, k, head_dim).masked_fill_(position > at, -torch.inf).softmax(-1)
        between = attention.masked_fill_((position < sinks) | (position > at - recent), 0)
        shares += between.sum(-1).view(kv_heads, -1).sum(1)
    return shares / (q.shape[1] * (length - first))


def _heads(which: Tensor, grouped: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of some KV heads; grouped: q as [B, G, H / G, D]."""
    q = grouped[:, which]
    return q.view(len(q), -1, 1, q.shape[3]), k[:, which], v[:, which]


def _read_gates(path: str) -> list[Tensor]:
    """Return the gates of each layer. Raises ValueError if the file cannot be read as numbers."""
    try:
        lines = read_file(path, _MAX_BYTES).decode("utf-8-sig").splitlines()
        gates = [[float(number) for number in line.split()] for line in lines if line.strip()]
    except (UsageError, ValueError) as error:
        raise ValueError(
            f"gates={path} cannot be read ({str(error).rstrip('.')}). Give a file with a line per layer and a number "
            f"per KV head."
        ) from error
    if wrong := [number for of_layer in gates for number in of_layer if not -_SLACK <= number <= 1 + _SLACK]:
        raise ValueError(f"gates={path} has the gate {wrong[0]:g}. Gates must be numbers from 0 to 1.")
    return [torch.tensor(of_layer) for of_layer in gates]
