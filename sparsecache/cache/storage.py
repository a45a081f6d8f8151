"""How keys and values are stored: in the dtype of the model, or in fewer bits.

A storage has a row per token, in the order of the text. It knows nothing of budgets and selections, so every method
that only adds rows at the end can use any of them.
"""

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor

from sparsecache.cache.base import CacheConfig
from sparsecache.cache.host import allocate, copy_into
from sparsecache.kernels.decode import attend_and_append, attend_selected
from sparsecache.kernels.page_selection import PageSelection
from sparsecache.kernels.quantisation import Bits, QuantisedStore, token_nbytes
from sparsecache.kernels.quantised_decode import (
    attend_pages_quantised,
    attend_quantised,
    attend_selected_quantised,
    attends_to_pages,
)
from sparsecache.kernels.rows import index_slots, take_rows
from sparsecache.kernels.store_quantised import append_quantised, store_prompt_quantised
from sparsecache.kernels.threshold import Selection

Storage = Literal["full", "int8", "int4", "int2"]
GROUP, RESIDUAL = 32, 128  # KIVI's settings for LongBench
_BITS: dict[Storage, Bits] = {"int8": 8, "int4": 4, "int2": 2}


class KVStorage(ABC):
    """Keys and values of one layer: rows per slot and KV head.

    Arguments: lengths [slots] or, per KV head, [slots, G] int64, the rows in use, which the caller counts; slots [B]
    int64; q [B, H, 1, D]; k, v [B, G, 1, D]. token_nbytes: the bytes of a token's key and value in all KV heads.
    """

    token_nbytes: float

    @abstractmethod
    def store(self, slot: int, k: Tensor, v: Tensor, counts: Tensor | None = None) -> None:
        """Store the first counts [G] rows, by default all, of k and v [G, L, D] in a free slot."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, slots: Tensor) -> Tensor:
        """Append one row to each slot, and return the attention over the rows before and the new one: [B, H, 1, D]."""

    @abstractmethod
    def attend_selected(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, slots: Tensor, selection: Selection | PageSelection
    ) -> Tensor:
        """As `attend`, but only over the new row and the selected ones: pages only where `attends_to_pages`.

        With pages the new row is stored on `config.deferred`: only work there, or the next step, may read it.
        """

    def attends_to_pages(self, page: int) -> bool:
        """Return whether `attend_selected` takes a PageSelection with pages of `page` tokens."""
        return False

    @abstractmethod
    def keys_of(self, lengths: Tensor, slots: Tensor, rows: Tensor | int) -> Tensor:
        """Return keys as attention sees them, read-only: [B, G, N, D].

        rows: [B, G, N], or N, which stands for the first N. Rows that are not in use are undefined.
        """

    @abstractmethod
    def recent_keys(self, tokens: int) -> Tensor | None:
        """Return a buffer [slots, G, R, D] with at least the last `tokens` keys, not quantised; None if none has them.

        Position p is in row p % R.
        """

    def read_nbytes(self, tokens: float) -> float:
        """Return the fewest bytes that attention over `tokens` tokens of a sequence reads."""
        return tokens * self.token_nbytes


class FullStorage(KVStorage):
    """Keys and values in the model's dtype.

    keys, values: [slots, G, rows, D], on the device or, with `offload`, in pinned host memory.
    """

    def __init__(self, config: CacheConfig, rows: int, offload: bool = False) -> None:
        size = (config.slots, config.shape.kv_heads, rows, config.shape.head_dim)
        self.keys, self.values = (allocate(size, config.dtype, config.device, offload) for _ in range(2))
        self.token_nbytes = config.token_nbytes

    def store(self, slot: int, k: Tensor, v: Tensor, counts: Tensor | None = None) -> None:
        copy_into(self.keys[slot], k)
        copy_into(self.values[slot], v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, slots: Tensor) -> Tensor:
        return attend_and_append(q, k, v, self.keys, self.values, lengths, slots)

    def attend_selected(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, slots: Tensor, selection: Selection | PageSelection
    ) -> Tensor:
        assert not isinstance(selection, PageSelection)
        return attend_selected(q, k, v, self.keys, self.values, slots, *selection, lengths)

    def keys_of(self, lengths: Tensor, slots: Tensor, rows: Tensor | int) -> Tensor:
        return (
            index_slots(self.keys, slots)[:, :, :rows] if isinstance(rows, int) else take_rows(self.keys, slots, rows)
        )

    def recent_keys(self, tokens: int) -> Tensor:
        return self.keys


class QuantisedStorage(KVStorage):
    """Keys and values in 2, 4 or 8 bits, and the last tokens in the model's dtype, as `kivi` describes."""

    def __init__(
        self, config: CacheConfig, rows: int, bits: Bits, group: int = GROUP, residual: int = RESIDUAL
    ) -> None:
        """residual: the fewest last tokens in full precision, a multiple of group."""
        shape = config.shape
        self.quantised = QuantisedStore.allocate(
            config.slots, shape.kv_heads, rows, shape.head_dim, bits, group, residual, config.device, config.dtype
        )
        self.token_nbytes = shape.kv_heads * token_nbytes(shape.head_dim, bits, group, config.dtype)
        self._unquantised_nbytes = config.token_nbytes
        self._deferred = config.deferred

    def store(self, slot: int, k: Tensor, v: Tensor, counts: Tensor | None = None) -> None:
        store_prompt_quantised(k, v, self.quantised, slot, counts)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, slots: Tensor) -> Tensor:
        return attend_quantised(q, k, v, self.quantised, lengths, slots)

    def attend_selected(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, slots: Tensor, selection: Selection | PageSelection
    ) -> Tensor:
        if isinstance(selection, PageSelection):
            out = attend_pages_quantised(q, k, v, self.quantised, lengths, slots, selection)
            with self._deferred.reading(k, v, lengths, slots):
                append_quantised(k, v, self.quantised, lengths, slots)
        else:
            out = attend_selected_quantised(q, k, v, self.quantised, lengths, slots, *selection)
            append_quantised(k, v, self.quantised, lengths, slots)
        return out

    def attends_to_pages(self, page: int) -> bool:
        return attends_to_pages(self.quantised, page)

    def keys_of(self, lengths: Tensor, slots: Tensor, rows: Tensor | int) -> Tensor:
        return self.quantised.keys(lengths, slots, rows)

    def recent_keys(self, tokens: int) -> Tensor | None:
        return self.quantised.key_tail if tokens <= self.quantised.residual else None

    def read_nbytes(self, tokens: float) -> float:
        in_tail = min(tokens, self.quantised.residual)
        return in_tail * self._unquantised_nbytes + (tokens - in_tail) * self.token_nbytes


def stored_token_nbytes(storage: Storage, config: CacheConfig) -> float:
    """Return the bytes of a token's key and value in one layer; those of the full-precision tail are not counted."""
    if storage == "full":
        return config.token_nbytes
    return config.shape.kv_heads * token_nbytes(config.shape.head_dim, _BITS[storage], GROUP, config.dtype)


def make_storage(storage: Storage, config: CacheConfig, rows: int) -> KVStorage:
    """Return the storage of an option `storage`, with `rows` rows per slot and KV head."""
    return FullStorage(config, rows) if storage == "full" else QuantisedStorage(config, rows, _BITS[storage])
