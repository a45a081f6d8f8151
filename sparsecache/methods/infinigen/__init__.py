"""InfiniGen: guess, one layer ahead, which past tokens matter, and attend to those alone (OSDI'24, arXiv 2406.19707).

The guess is the next layer's query made of this layer's input; it meets a few telling columns of that layer's keys.

GQA: the paper has one KV head a query head. Here a token is as near to a KV head as to the query head, of those that
share it, to whose best score it comes nearest; and a KV head has one skewing matrix and one set of columns.

What differs: keys are rotated by RoPE, so the skewing matrix is made and used behind it; as many columns as make 32
(`partial_weight_ratio`), where the paper takes 0.3 of them; and what was not in the paper is off by default.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsecache.kernels._triton import in_kernels
from sparsecache.kernels.attention import attention_over_rows
from sparsecache.kernels.cut import Rule
from sparsecache.kernels.rows import of_slots
from sparsecache.kernels.scores import scaled_scores
from sparsecache.kernels.selection import Fetch, count_near, distance_to_best, highest, put_first
from sparsecache.methods._layers import Marks
from sparsecache.methods._sparse import SparseMethod, is_share_or_count
from sparsecache.methods.base import GuessFrom, Shape
from sparsecache.methods.infinigen.gpu_cache import GpuCache
from sparsecache.methods.infinigen.pool import Eviction, Pool, Selections
from sparsecache.methods.infinigen.skewing import skewing_matrix
from sparsecache.methods.infinigen.speculation import PartialKeys
from sparsecache.methods.infinigen.unbounded import Unbounded

_COLUMNS = 32
_ALL = 2**31 - 1  # tokens, as many as a kernel counts to
_REPLAYED = 32  # last prompt positions whose selections decide what a full pool keeps
_BUNDLED = Path(__file__).parent / "calibration.txt"


class InfiniGen(SparseMethod):
    """Speculates on partial keys, selects by distance to the best, keeps keys and values in a pool."""

    least_dense = 1  # layer 0 has no predecessor to guess from
    lossless: ClassVar[dict[str, Any] | None] = {"budget": 1.0, "alpha": math.inf, "dense_layers": 1}
    tight: ClassVar[dict[str, Any]] = {"budget": 4, "alpha": 2.0, "dense_layers": 1, "partial_weight_ratio": 0.5}

    def __init__(
        self,
        alpha: Annotated[float, "how far below the best speculated score a fetched token may be, 0 to inf"] = 5.0,
        partial_weight_ratio: Annotated[
            float | None, "share of the columns that speculate, above 0 to 1; none: 32 columns"
        ] = None,
        budget: Annotated[float, "most past tokens fetched: a share of them up to 1, else a count"] = 0.2,
        fetch: Annotated[Fetch, "one count for a layer, the mean over its KV heads, or a count for each"] = "mean",
        dense_layers: Annotated[int, "first layers that attend to everything, 1 at least"] = 2,
        skew: Annotated[bool, "rotate queries and keys so that few columns tell more"] = True,
        guess: Annotated[
            GuessFrom, "what the next layer's query is guessed from: the paper's input, with its own norm, or later"
        ] = "input",
        sinks: Annotated[int, "first tokens that are always fetched, within the budget, 0 or more"] = 0,
        recent: Annotated[int, "last tokens that are always fetched, within the budget, 0 or more"] = 0,
        capacity: Annotated[float, "most tokens kept per layer and KV head: a share up to 1, else a count"] = 1.0,
        eviction: Annotated[Eviction, "who leaves a full pool: oldest, longest or least selected"] = "counter",
        offload: Annotated[bool, "keep keys and values of the sparse layers in pinned host memory"] = False,
        gpu_cache: Annotated[int, "with offload: fetched tokens kept on the GPU per layer and KV head, 0 or more"] = 0,
        calibration_file: Annotated[str | None, "text that the skewing matrices are made from; none: bundled"] = None,
    ) -> None:
        super().__init__(budget, dense_layers)
        self.guesses_from = guess
        self.graphable = self._never_evicts = capacity == 1
        self._alpha, self._ratio, self._fetch, self._skew = alpha, partial_weight_ratio, fetch, skew
        self._sinks, self._recent = (min(tokens, _ALL) for tokens in (sinks, recent))
        self._share, self._eviction = capacity, eviction
        self._offload, self._gpu_tokens = offload, gpu_cache
        self._calibration_file = calibration_file
        self._matrices: list[Tensor] = []
        self._check_options()

    def _check_options(self) -> None:
        if not self._alpha >= 0:
            raise ValueError(f"alpha={self._alpha} must be 0 or more (inf: no limit but the budget).")
        if self._ratio is not None and not 0 < self._ratio <= 1:
            raise ValueError(f"partial_weight_ratio={self._ratio} must be above 0 and at most 1.")
        if not is_share_or_count(self._share):
            raise ValueError(f"capacity={self._share} must be a share above 0 up to 1, or a whole number of tokens.")
        for name, tokens in (("sinks", self._sinks), ("recent", self._recent), ("gpu_cache", self._gpu_tokens)):
            if tokens < 0:
                raise ValueError(f"{name}={tokens} must be 0 tokens or more.")
        if self._gpu_tokens and not self._offload:
            raise ValueError(f"gpu_cache={self._gpu_tokens} keeps offloaded tokens on the GPU: give offload=true too.")

    def check(self, shape: Shape) -> None:
        super().check(shape)
        if self._columns(shape) < 1:
            least = 1 / shape.head_dim
            raise ValueError(
                f"partial_weight_ratio={self._ratio} leaves none of {shape.head_dim} columns; give {least:g} to 1."
            )

    def _columns(self, shape: Shape) -> int:
        if self._ratio is None:
            return min(_COLUMNS, shape.head_dim)
        return math.floor(self._ratio * shape.head_dim + 1e-6)

    def calibration_text(self) -> str | None:
        if not self._skew:
            return None
        path = Path(self._calibration_file) if self._calibration_file is not None else _BUNDLED
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"calibration_file={path} cannot be read as UTF-8 text ({error}).") from error

    def calibrate(self, layer: int, q: Tensor) -> None:
        self._matrices[layer:] = [skewing_matrix(q).cpu()]

    def calibration(self) -> dict[str, Tensor]:
        return {"skewing_matrix": torch.stack(self._matrices)}

    def restore(self, calibration: dict[str, Tensor], shape: Shape) -> None:
        matrices = calibration.get("skewing_matrix")
        wanted = (shape.layers, shape.kv_heads, shape.head_dim, shape.head_dim)
        if matrices is None or tuple(matrices.shape) != wanted:
            found = None if matrices is None else tuple(matrices.shape)
            raise ValueError(f"its skewing_matrix has the shape {found}; this model needs {wanted}.")
        matrices = matrices.float()
        if not torch.allclose(matrices @ matrices.mT, torch.eye(shape.head_dim).expand(wanted), atol=1e-4):
            raise ValueError("its skewing_matrix is not orthogonal.")
        self._matrices = list(matrices)

    def make_room(self, layers: int, slots: int, max_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        for part in ("_pool", "_partial", "_gpu_cache", "_unbounded"):  # frees the old room before taking the new
            vars(self).pop(part, None)
        rows = self._capacity(max_tokens)
        matrices = self._skewing_matrices()
        self._selected: dict[int, Tensor] = {}  # rows by layer, from its guess to its attention
        self._partial = PartialKeys(matrices, self._columns(self.shape), slots, rows, self.shape, self.devices, dtype)
        self._unbounded: Unbounded | None = None
        self._gpu_cache: GpuCache | None = None
        if self._gpu_tokens:
            self._gpu_cache = GpuCache(self.devices, slots, min(self._gpu_tokens, rows), rows, self.shape, dtype)
        self._marks = Marks([*self._tally.counters, *([self._gpu_cache.found] if self._gpu_cache else [])])
        if self._never_evicts and in_kernels(device):
            caps = self.budget.caps(max_tokens)
            rule = Rule(self._alpha, caps, self._fetch == "mean", self._sinks, self._recent)
            self._unbounded = Unbounded(
                self._partial, rule, self.devices, slots, self.shape, self._offload, self._gpu_cache
            )
            return
        self._pool = Pool(self.devices, slots, rows, self.shape, self._eviction, self._offload, dtype)

    def _skewing_matrices(self) -> Tensor:
        """Of the sparse layers, [layers, G, D, D]."""
        shape = self.shape
        if not self._skew:
            return torch.eye(shape.head_dim).expand(shape.layers - self.first, shape.kv_heads, -1, -1)
        if len(self._matrices) != shape.layers:
            raise RuntimeError("InfiniGen with skew=true must see its calibration text before it takes a prompt.")
        return torch.stack(self._matrices)[self.first :]

    def _capacity(self, tokens: int) -> int:
        """Rows for a sequence that comes to `tokens` tokens at most."""
        return max(1, math.ceil(self._share * tokens - 1e-6)) if self._share <= 1 else min(tokens, int(self._share))

    def take_prompt(self, layer: int, slot: int, q: Tensor, k: Tensor, v: Tensor, max_new_tokens: int) -> None:
        if layer == 0 and self._gpu_cache is not None:
            self._gpu_cache.release(slot)  # steps that named the slot while it was empty may have left something
        if self._unbounded is not None:
            self._unbounded.fill(layer, slot, q, k, v)
            return
        length = k.shape[1]
        capacity = self._capacity(length + max_new_tokens)
        partial_k = self._partial.fill(layer, slot, q, k)
        replayed = self._replay(self._partial.of(layer, slot, q), partial_k) if length > capacity else None
        kept = self._pool.fill(layer, slot, k, v, capacity, replayed)
        of_columns = kept[..., None].expand(-1, -1, partial_k.shape[-1])
        self._partial.keep(layer, slot, partial_k.gather(1, of_columns))

    def _replay(self, q: Tensor, k: Tensor) -> Selections:
        """What the last queries of a prompt select by their own partial scores. q: [H, L, I], k: [G, L, I]."""
        kv_heads, length = k.shape[:2]
        selections = Selections(kv_heads, length, k.device)
        for at in range(max(1, length - _REPLAYED), length):
            scores = scaled_scores(q[:, at : at + 1], k[:, :at], self.shape.head_dim)[:, 0]
            past, cap = torch.tensor([[at], [self.budget.cap(at)]], device=k.device)
            distance = distance_to_best(scores[None], kv_heads)
            distance = put_first(distance, selections.positions[None, :, :at], past, self._sinks, self._recent)
            selections.note(highest(distance, count_near(distance, self._alpha, cap, self._fetch))[0], at)
        return selections

    def beside(self, *tensors: Tensor) -> AbstractContextManager[None]:
        return nullcontext() if self._unbounded is None else self._unbounded.sides.reading(*tensors)

    def guesses(self, layer: int) -> bool:
        return layer >= self.first

    def anticipate(self, layer: int, q: Tensor, slots: Tensor) -> None:
        layer -= self.first
        if self._unbounded is not None:
            if layer == 0:  # before this step writes anything down
                self._marks.take()
            self._unbounded.anticipate(layer, q, slots, self.ledger(layer))
            return
        past, cap = self.past_and_cap(layer, slots)
        rows = self._pool.rows_held(layer)
        scores = self._partial.scores(layer, slots, q, rows)
        empty = self._pool.empty(layer, slots, rows)
        if empty is not None:
            scores = scores.masked_fill(empty[:, None], -torch.inf)
        distance = distance_to_best(scores, self.shape.kv_heads)
        if self._sinks or self._recent:
            positions = of_slots(self._pool.positions[layer], slots)[:, :, :rows]
            distance = put_first(distance, positions, past, self._sinks, self._recent)
        order = self._pool.order(layer, slots, rows)
        if order is not None:
            distance = distance.gather(2, order)
        chosen = highest(distance, count_near(distance, self._alpha, cap, self._fetch))
        if order is not None:
            chosen = torch.where(chosen >= 0, order.gather(2, chosen.clamp(min=0)), -1)
        self._selected[layer] = chosen

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        if layer < self.first or self._unbounded is None:
            return super().attend(layer, q, k, v, slots)
        layer -= self.first
        return self._unbounded.attend(layer, q, k, v, slots, self.ledger(layer))

    def attend_past(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, past: Tensor, cap: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = self._selected.pop(layer)
        if self._gpu_cache is not None:
            keys, values = self._gpu_cache.fetch(self._pool, layer, slots, rows)
        else:
            keys, values = self._pool.fetch(layer, slots, rows)
        if self._share != 1:
            self._pool.note_selected(layer, slots, rows, past)
        chosen = rows >= 0
        seen = None if bool(chosen.all()) else pad(chosen, (0, 1), value=True)
        out = attention_over_rows(q, torch.cat((keys, k), 2), torch.cat((values, v), 2), seen)
        self._take_token(layer, k, v, slots, past)
        return out, chosen.sum(2)

    def _take_token(self, layer: int, k: Tensor, v: Tensor, slots: Tensor, position: Tensor) -> None:
        rows = self._pool.append(layer, slots, k, v, position)
        self._partial.put(layer, slots, rows, k)
        if self._gpu_cache is not None:
            self._gpu_cache.forget(layer, slots, rows)

    def release(self, slot: int) -> None:
        super().release(slot)
        if self._unbounded is None:
            self._pool.release(slot)
        if self._gpu_cache is not None:
            self._gpu_cache.release(slot)

    def retract(self, slot: int) -> None:
        self._marks.restore(slot)

    def report(self, slot: int) -> dict[str, Any]:
        if not self._offload:
            return super().report(slot)
        read, hits = self.fetched(slot), self._gpu_cache.hits(slot) if self._gpu_cache is not None else 0
        each = 2 * self.shape.head_dim * self._partial.dtype.itemsize
        return {
            **super().report(slot),
            "fetched_bytes": (read - hits) * each,
            "gpu_cache_hit": hits / read if read else None,
        }
