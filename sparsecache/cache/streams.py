"""Side streams on a GPU, for work whose results later layers or the next step need."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class SideStream:
    """A second stream on a GPU, with high or default priority. On a CPU its work runs immediately."""

    def __init__(self, device: torch.device, high_priority: bool) -> None:
        make: Any = torch.cuda.Stream
        self._device = device
        self._stream: Any = make(device, priority=-high_priority) if device.type == "cuda" else None

    @property
    def is_parallel(self) -> bool:
        """Return whether work on this stream may run in parallel with the current stream's."""
        return self._stream is not None

    @contextmanager
    def reading(self, *tensors: Tensor) -> Iterator[None]:
        """Run the block on this stream, after the work on the current stream so far; it reads the tensors.

        The allocator does not reuse the tensors' memory until the block is done. Tensors that the block makes may be
        used outside once it is done. The next block may reuse their memory, so delete them only if that block waits for
        all work that reads them.
        """
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(self._stream)
        with self.after():
            yield

    @contextmanager
    def after(self) -> Iterator[None]:
        """Run the block as `reading`; the caller keeps the tensors until the current stream has joined."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Run the block on this stream, and let the current stream wait for it."""
        with self.after():
            yield
        self.join()

    def join(self) -> None:
        """Let the current stream wait for all work on this one."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


class PromptStream:
    """A side stream on which the layers of a prompt are stored, in parallel with attention and MLP of the model.

    Its priority is the default, the lowest that there is: the model's own operations decide when the prompt ends. On a
    CPU its work runs immediately.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = SideStream(device, high_priority=False)
        self._tensors: tuple[Tensor, ...] = ()

    @contextmanager
    def storing(self, *tensors: Tensor) -> Iterator[None]:
        """Run the block on this stream, after the work on the current stream so far; it reads the tensors of a layer.

        The current stream waits for the previous block first, and the tensors of that block are dropped. So those of
        one layer are kept at a time, however far the host is ahead of the device. After `record_stream` the allocator
        would instead keep those of all layers until the device has read them.
        """
        self.join()
        if self._stream.is_parallel:
            self._tensors = tensors
        with self._stream.after():
            yield

    def join(self) -> None:
        """Let the current stream wait for the latest block, and drop its tensors."""
        self._stream.join()
        self._tensors = ()


def record_event(device: torch.device) -> Any:
    """Return an event of the current stream of a GPU; None on the CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def wait_event(event: Any, device: torch.device) -> None:
    """Let the current stream wait for an event; None: for nothing."""
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)
