"""Fake streams on the CPU that find races: operations on two streams that nothing orders, over the same memory.

Operations run in the order of the program. Each stream counts its own and knows how far it waited for each other one.
Memory is compared by the range of bytes that a tensor spans, so parts of one tensor count as separate only if their
ranges are. Freed memory belongs to the stream that allocated it, as with torch's allocator on a GPU. It is a race too
if that stream makes a tensor while another stream may still use the memory.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsecache.cache import streams
from sparsecache.methods.infinigen import cache as infinigen

Clock = dict["FakeStream", int]


class FakeStream:
    """A stream: how many operations of each stream are done before its next one."""

    def __init__(self) -> None:
        self.clock: Clock = {}

    def wait(self, clock: Clock) -> None:
        """Let the next operations come after those of a clock."""
        for stream, time in clock.items():
            self.clock[stream] = max(time, self.clock.get(stream, 0))

    def wait_stream(self, other: "FakeStream") -> None:
        """As torch.cuda.Stream.wait_stream."""
        self.wait(other.clock)

    def tick(self) -> int:
        """Count an operation; return its number."""
        self.clock[self] = self.clock.get(self, 0) + 1
        return self.clock[self]


@dataclass
class _Access:
    """An operation's access to bytes first to last of a storage."""

    stream: FakeStream
    time: int
    first: int
    last: int
    is_write: bool
    operation: str

    def conflicts(self, later: "_Access") -> bool:
        """Return whether a later access may be made at the same time, and one of them writes to the same bytes."""
        ordered = later.stream.clock.get(self.stream, 0) >= self.time
        overlaps = self.first <= later.last and later.first <= self.last
        return overlaps and (self.is_write or later.is_write) and not ordered


@dataclass
class _Memory:
    """A storage: the stream it was allocated on, the accesses, and the streams of `record_stream`."""

    stream: FakeStream
    accesses: list[_Access]
    recorded: set[FakeStream]


class FakeStreams(TorchDispatchMode):
    """Gives every SideStream a FakeStream, and records in `races` what is not ordered."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.races: list[str] = []
        self.current = self.main = FakeStream()
        self._side_streams: list[FakeStream] = []
        self._memory: dict[int, _Memory] = {}
        self._freed: dict[FakeStream, list[_Access]] = {}
        patch.setattr(
            streams.SideStream, "__init__", lambda stream, device, high_priority: self._make_side_stream(stream, device)
        )
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        patch.setattr(torch.cuda, "stream", self._use)
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: self._of(tensor).recorded.add(stream))
        patch.setattr(infinigen, "record_event", lambda device: dict(self.current.clock))
        patch.setattr(infinigen, "wait_event", lambda event, device: self.current.wait(event or {}))

    def is_joined(self) -> bool:
        """Return whether the main stream has waited for all others."""
        known = self.main.clock
        return all(known.get(stream, 0) == stream.clock.get(stream, 0) for stream in self._side_streams)

    def _make_side_stream(self, stream: Any, device: torch.device) -> None:
        stream._device, stream._stream = device, FakeStream()
        self._side_streams.append(stream._stream)

    @contextmanager
    def _use(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def _of(self, tensor: Tensor) -> _Memory:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._memory:
            self._memory[key] = _Memory(self.current, [], set())
            weakref.finalize(storage, self._free, key).atexit = False
        return self._memory[key]

    def _free(self, key: int) -> None:
        memory = self._memory.pop(key)
        self._freed.setdefault(memory.stream, []).extend(
            access for access in memory.accesses if access.stream not in memory.recorded
        )

    def _reuse(self, operation: str) -> None:
        """Let the current stream allocate what was freed on it, for an operation."""
        for access in self._freed.pop(self.current, []):
            if self.current.clock.get(access.stream, 0) < access.time:
                self.races.append(f"{operation} may get freed memory that {access.operation} may still use.")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        written, read = [], []
        for argument, value in zip(func._schema.arguments, args, strict=False):
            mutable = argument.alias_info is not None and argument.alias_info.is_write
            (written if mutable else read).extend(_tensors(value))
        for argument in func._schema.arguments:
            if argument.name in kwargs:
                mutable = argument.alias_info is not None and argument.alias_info.is_write
                (written if mutable else read).extend(_tensors(kwargs[argument.name]))
        inputs = {tensor.untyped_storage()._cdata for tensor in (*written, *read)}
        made = [tensor for tensor in _tensors(out) if tensor.untyped_storage()._cdata not in inputs]
        if made or written or not list(_tensors(out)):  # else a view, which touches no memory
            if made:
                self._reuse(str(func))
            time = self.current.tick()
            for tensor in read:
                self._access(tensor, time, False, str(func))
            for tensor in (*written, *made):
                self._access(tensor, time, True, str(func))
        return out

    def _access(self, tensor: Tensor, time: int, is_write: bool, operation: str) -> None:
        if not tensor.numel():
            return
        memory = self._of(tensor)
        first = tensor.storage_offset() * tensor.itemsize
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        access = _Access(self.current, time, first, first + (span + 1) * tensor.itemsize - 1, is_write, operation)
        for earlier in memory.accesses:
            if earlier.conflicts(access):
                self.races.append(f"{operation} is not ordered after {earlier.operation}.")
        same = (access.stream, access.first, access.last, access.is_write)
        memory.accesses = [
            kept for kept in memory.accesses if (kept.stream, kept.first, kept.last, kept.is_write) != same
        ]
        memory.accesses.append(access)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
