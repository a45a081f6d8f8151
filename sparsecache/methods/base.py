"""The seam between the decoder and a cache method: what each promises the other.

One instance of a method serves one engine and owns the keys and values of all its slots; a slot is one
sequence in flight. The decoder knows weights and tokens, the method knows KV; neither looks into the other.
A step is, for each layer i in order: `anticipate(i + 1)`, if there is one and the method guesses it, and
`attend(i)`; which of the two comes first depends on what is guessed from (`guesses_from`).
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

GuessFrom = Literal["input", "own_norm", "residual"]


@dataclass(frozen=True)
class Shape:
    """The attention shape of a model: L layers, H query heads sharing G key/value heads of D dimensions.

    devices: where each layer lies, if the model is split over several devices; empty: all on one.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    devices: tuple[torch.device, ...] = ()

    def places(self, device: torch.device) -> tuple[torch.device, ...]:
        """The device of each layer, where a model that is not split lies on `device`."""
        return self.devices or (device,) * self.layers

    def kv_nbytes(self, dtype: torch.dtype) -> int:
        """Keys and values of one token in all layers, bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize


class Method(ABC):
    """A way to keep, and attend to, the keys and values of past tokens.

    A subclass lives in `methods/<name>.py`; its constructor's annotated arguments, all with defaults, are the
    options of `-o key=value` (raise ValueError, in a full sentence, for a value out of range).

    graphable: whether a decode step may be captured in a CUDA graph (no synchronisation, fixed addresses), which is
        done on a GPU. A sequence may then be decoded one step too far before it is known to have ended (`retract`).
    guesses_from: what the next layer's query is guessed from for `anticipate`; None: it is not called. "input": this
        layer's attention input, normed as it was (InfiniGen). "own_norm": the same before its norm, with the next
        layer's norm. "residual": the residual stream after this layer's attention, with the next layer's norm.
    calibration_version: to be raised when `calibrate` learns something else from the same queries.
    keeps_new: whether generated tokens are attended to on top of the method's budget.
    lossless: options under which nothing is dropped, so that the text is vanilla's; None if there are none.
    tight: options under which tokens are dropped within a prompt of a few dozen tokens. The contract tests
        (tests/methods) run under the defaults and these, and compare `lossless` with transformers; a method
        needs at least one of the two.
    """

    graphable = False
    guesses_from: GuessFrom | None = None
    calibration_version: ClassVar[int] = 1
    keeps_new: ClassVar[bool] = False
    lossless: ClassVar[dict[str, Any] | None] = None
    tight: ClassVar[dict[str, Any]] = {}

    def check(self, shape: Shape) -> None:  # noqa: B027 (a no-op unless options depend on the shape)
        """Raises ValueError, in a full sentence, if the options do not fit a model of this shape."""

    @abstractmethod
    def allocate(self, shape: Shape, slots: int, max_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        """Makes room for `slots` sequences of up to `max_tokens` tokens each, replacing any earlier room.

        A layer's inputs, its `slots` among them, come on `shape.places(device)[layer]`; what is kept of it belongs
        there (`methods/_layers.py`).
        """

    def calibration_text(self) -> str | None:
        """A text whose queries the method wants to see, through `calibrate`, before the first prompt; None: none.

        It is run once, before `allocate`, or never again when `calibration` is restored from an earlier run.
        """
        return None

    def calibrate(self, layer: int, q: Tensor) -> None:  # noqa: B027 (a no-op unless a method asks for it)
        """Is shown a layer's rotated queries over the calibration text; once a layer, in order.

        q: [G, H / G, L, D], by the KV head that they read.
        """

    def calibration(self) -> dict[str, Tensor]:
        """What `calibrate` learned, by name, for `restore`."""
        return {}

    def restore(self, calibration: dict[str, Tensor], shape: Shape) -> None:  # noqa: B027 (as calibrate)
        """Takes what `calibration` of an earlier run returned, instead of `calibrate`.

        Raises ValueError, saying what is wrong with it, if it does not fit a model of this shape.
        """

    @abstractmethod
    def prefill(self, layer: int, slot: int, q: Tensor, k: Tensor, v: Tensor, max_new_tokens: int) -> None:
        """Takes a prompt's rotated q [H, L, D], k and v [G, L, D] into an empty slot; called once a layer, in order.

        At most max_new_tokens more tokens will follow. The inputs must not be changed.
        The attention over the prompt itself is dense and exact, and not the method's business.
        """

    def beside(self, *tensors: Tensor) -> AbstractContextManager[None]:
        """Within it a guess, its query and `anticipate`, is made of tensors on one device: in a stream, say."""
        return nullcontext()

    def guesses(self, layer: int) -> bool:
        """Whether `anticipate` is to be called for a layer."""
        return self.guesses_from is not None

    def anticipate(self, layer: int, q: Tensor, slots: Tensor) -> None:  # noqa: B027 (a no-op unless it guesses)
        """Is told, before `layer` runs, what it will ask, guessed in the layer before from `guesses_from`.

        q: [B, H, 1, D], rotated; slots as in the same step's `attend`.
        """

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        """Appends one token per row to the row's slot and returns the attention over what the slot keeps.

        q: [B, H, 1, D]; k, v: [B, G, 1, D], rotated; slots: [B] int64 on the device, no slot twice. Returns
        [B, H, 1, D]. A row may name a slot that is not in flight, more often than the slot has room: what it
        writes there is never read, and it must not fail.
        """

    @abstractmethod
    def release(self, slot: int) -> None:
        """Forgets a sequence completely; releasing an empty slot does nothing."""

    def retract(self, slot: int) -> None:  # noqa: B027 (a no-op where nothing is reported of a step)
        """Forgets of the last step what `report` would say of it; `report` and `release` follow.

        Called where a step was a graph. Whoever reports anything of steps remembers, as one begins, what it would
        report without it: `Marks` (methods/_layers.py).
        """

    def report(self, slot: int) -> dict[str, Any]:
        """What was kept of the sequence in `slot`, for its record: JSON values under keys of the method's own.

        Called before `release`. A key that the record has already, or a value that is not JSON, is an error.
        """
        return {}
