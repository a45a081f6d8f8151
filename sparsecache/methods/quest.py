"""Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (ICML'24, arXiv 2406.10774).

Keys lie in pages of `page` tokens, and of each page the lowest and highest value of every channel is kept. They bound
what q . k can be for any key of the page: sum over channels of max(q * lowest, q * highest). Pages are attended to in
falling order of this bound until the budget is reached. Everything is kept; what is saved is attention, not memory.

GQA: the paper has one KV head a query head. Here a page counts for a KV head what it counts for the query head with
the highest bound.

What differs: the budget is of tokens, so the last page that fits in part gives its latest tokens only; the paper takes
whole pages, and its kernels always the last one. The current token is attended to in any case, on top of the budget.
"""

from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsecache.kernels.rows import of_slots
from sparsecache.methods._layers import per_layer
from sparsecache.methods._sparse import ChoosingMethod


class Quest(ChoosingMethod):
    """Chooses the pages that could hold the highest scores."""

    lossless: ClassVar[dict[str, Any] | None] = {"budget": 1.0, "dense_layers": 0}
    tight: ClassVar[dict[str, Any]] = {"budget": 6, "page": 4, "dense_layers": 0}

    def __init__(
        self,
        budget: Annotated[float, "most past tokens attended to: a share of them up to 1, else a count"] = 0.2,
        page: Annotated[int, "tokens in a page, 1 or more"] = 16,
        dense_layers: Annotated[int, "first layers that attend to everything"] = 2,
    ) -> None:
        super().__init__(budget, dense_layers)
        if page < 1:
            raise ValueError(f"page={page} must be 1 token or more.")
        self._page = page

    def make_room(self, layers: int, slots: int, max_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        super().make_room(layers, slots, max_tokens, device, dtype)
        size = (slots, self.shape.kv_heads, -(-max_tokens // self._page), self.shape.head_dim)
        self._lowest = per_layer(self.devices, *size, dtype=dtype)
        self._highest = per_layer(self.devices, *size, dtype=dtype)

    def take_prompt(self, layer: int, slot: int, q: Tensor, k: Tensor, v: Tensor, max_new_tokens: int) -> None:
        super().take_prompt(layer, slot, q, k, v, max_new_tokens)
        kv_heads, length, head_dim = k.shape
        pages = -(-length // self._page)
        for bounds, value, extreme in (
            (self._lowest, torch.inf, Tensor.amin),
            (self._highest, -torch.inf, Tensor.amax),
        ):
            paged = pad(k, (0, 0, 0, pages * self._page - length), value=value)
            paged = paged.view(kv_heads, pages, self._page, head_dim)
            bounds[layer, slot, :, :pages] = extreme(paged, 2)

    def attend_past(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, past: Tensor, cap: Tensor
    ) -> tuple[Tensor, Tensor]:
        found = super().attend_past(layer, q, k, v, slots, past, cap)
        key, page = k[:, :, 0], past // self._page
        begins = (past % self._page == 0)[:, None, None]  # what the page held before is another sequence's
        for bound, nearer in ((self._lowest[layer], torch.minimum), (self._highest[layer], torch.maximum)):
            bound[slots, :, page] = torch.where(begins, key, nearer(bound[slots, :, page], key))
        return found

    def choose(self, layer: int, q: Tensor, slots: Tensor, past: Tensor, cap: Tensor) -> Tensor:
        pages = -(-int(past.max()) // self._page)
        offsets = torch.arange(self._page, device=q.device)
        held = (past[:, None] - self._page * torch.arange(pages, device=q.device)).clamp(0, self._page)  # [B, pages]
        order = self._bounds(layer, q, slots, pages).sort(dim=-1, descending=True, stable=True).indices  # [B, G, pages]
        held = held[:, None].expand_as(order)
        in_order = held.gather(2, order)
        before = in_order.cumsum(2) - in_order
        taken = torch.zeros_like(held).scatter(2, order, (cap[:, None, None] - before).clamp(min=0))
        chosen = (offsets < held[..., None]) & (offsets >= (held - taken)[..., None])  # [B, G, pages, page]
        return _positions(chosen.flatten(2), int(cap.max()))

    def _bounds(self, layer: int, q: Tensor, slots: Tensor, pages: int) -> Tensor:
        """The highest score that each page could give to a head of the KV head: [B, G, pages] float32."""
        lowest, highest = (of_slots(x[layer], slots)[:, :, :pages].float().mT for x in (self._lowest, self._highest))
        grouped = q.float().view(len(slots), self.shape.kv_heads, -1, self.shape.head_dim)  # [B, G, g, D]
        return (grouped.clamp(min=0) @ highest + grouped.clamp(max=0) @ lowest).amax(2)


def _positions(chosen: Tensor, most: int) -> Tensor:
    """Where chosen [B, G, T] is true, at most `most` times: positions [B, G, N] ascending, then -1."""
    length = chosen.shape[2]
    positions = torch.arange(length, device=chosen.device).masked_fill(~chosen, length).sort(-1).values[..., :most]
    return positions.masked_fill(positions == length, -1)
