"""What the methods that evict share: room for what the budget allows and no more, and attention over what is held.

A token that was evicted is gone. A share of the past grows with it, so now and then nobody has to leave.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from sparsecache.kernels.scores import scaled_scores
from sparsecache.methods._rows import Rows
from sparsecache.methods._sparse import SparseMethod

_BLOCK = 64  # queries whose attention to a whole prompt is held at a time


class EvictingMethod(SparseMethod):
    """Holds the cap of tokens for each KV head: a subclass says who stays of a prompt, and who leaves at a step."""

    def make_room(self, layers: int, slots: int, max_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        vars(self).pop("rows", None)  # frees the old room before taking the new
        count = min(self.budget.cap(max_tokens) + 1, max_tokens)  # the new token comes before another one goes
        self.rows = [Rows(slots, count, self.shape, place, dtype) for place in self.devices]

    def take_prompt(self, layer: int, slot: int, q: Tensor, k: Tensor, v: Tensor, max_new_tokens: int) -> None:
        length = k.shape[1]
        stay = self.choose_prompt(layer, slot, q, k, min(self.budget.cap(length), length))
        self.rows[layer].fill(slot, k, v, stay)

    def attend_past(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, past: Tensor, cap: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = self.rows[layer]
        held = rows.held(slots)
        rows.append(slots, k, v, past)
        out = rows.attend(q, slots)
        self.make_way(layer, q, slots, past + 1, self.caps(past + 1))
        return out, held

    def release(self, slot: int) -> None:
        super().release(slot)
        for rows in self.rows:
            rows.release(slot)

    @abstractmethod
    def choose_prompt(self, layer: int, slot: int, q: Tensor, k: Tensor, count: int) -> Tensor:
        """The `count` positions of a prompt that each KV head keeps: [G, count]. q: [H, L, D], k: [G, L, D]."""

    @abstractmethod
    def make_way(self, layer: int, q: Tensor, slots: Tensor, past: Tensor, cap: Tensor) -> None:
        """Called after a step, its token among the rows: `past` [B] tokens by now, at most `cap` [B] of them to stay.

        q: [B, H, 1, D], the query of the step.
        """


def attention_sums(q: Tensor, k: Tensor, first: int) -> Tensor:
    """The attention that a prompt's tokens get from its queries from position `first` on: [G, L] float32.

    q: [H, L, D], k: [G, L, D]; summed over the heads of a KV head. No L x L tensor is built.
    """
    kv_heads, length, head_dim = k.shape
    sums = torch.zeros(kv_heads, length, device=k.device)
    for start in range(first, length, _BLOCK):
        end = min(start + _BLOCK, length)
        scores = scaled_scores(q[:, start:end], k[:, :end], head_dim)  # [H, block, end]
        later = torch.ones(end - start, end, device=k.device, dtype=torch.bool).triu(start + 1)
        got = scores.masked_fill_(later, -torch.inf).softmax(-1).sum(1)  # [H, end]
        sums[:, :end] += got.view(kv_heads, -1, end).sum(1)
    return sums
