"""Work beside the main stream of a GPU: what a later layer needs, and what only the next step reads."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Sides:
    """One more stream on each GPU of `devices`, whose kernels go first, or take their turn; on a CPU none."""

    def __init__(self, devices: Iterable[torch.device], first: bool) -> None:
        streams: Any = torch.cuda.Stream
        gpus = {device for device in devices if device.type == "cuda"}
        self._streams: dict[int | None, Any] = {device.index: streams(device, priority=-first) for device in gpus}

    @contextmanager
    def reading(self, *tensors: Tensor) -> Iterator[None]:
        """Work within runs beside the current stream, after all that is there by now; it may read the tensors.

        What it makes may be used outside once it is done. When its last name goes, what is made within next may take
        its memory: it is let go of only when the next `reading` waits for whatever still reads it. The memory of the
        tensors is given to others when the host finds that work done.
        """
        if (side := self._of(tensors[0].device)) is not None:
            for tensor in tensors:
                tensor.record_stream(side)
        with self.after(tensors[0].device):
            yield

    @contextmanager
    def after(self, device: torch.device) -> Iterator[None]:
        """As `reading`, of tensors that the caller keeps until the current stream has joined."""
        side = self._of(device)
        if side is None:
            yield
            return
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            yield

    @contextmanager
    def in_turn(self, device: torch.device) -> Iterator[None]:
        """Work within runs between what is on the current stream and what follows there.

        So it may read what was made there. What it makes may be used on any stream that the current one, when the next
        work begins here, has waited for.
        """
        side = self._of(device)
        if side is None:
            yield
            return
        current = torch.cuda.current_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            yield
        current.wait_stream(side)

    def join(self, device: torch.device) -> None:
        """Work on the current stream goes on when all beside it is done."""
        side = self._of(device)
        if side is not None:
            torch.cuda.current_stream(device).wait_stream(side)

    def _of(self, device: torch.device) -> Any:
        return self._streams.get(device.index, self._streams.get(None)) if device.type == "cuda" else None
