"""What the machine could do at best, measured in the same run: copies, products at the model's shapes, attention.

Every rate is a mean over about `_SECONDS`, since a rate over less says what a cool chip does.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsecache.bench.models import Subject
from sparsecache.cache.base import StepBytes
from sparsecache.engine.decoder import Decoder
from sparsecache.kernels.attention import prompt_attention

_SECONDS = 2.0


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a large copy within the device."""
    size = 2**31 if device.type == "cuda" else 2**28
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_each(lambda: target.copy_(source), device)


def link_rate(device: torch.device) -> float:
    """Bytes a second from pinned host memory to the device."""
    source = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(2**30, dtype=torch.uint8, device=device)
    return 2**30 / seconds_each(lambda: target.copy_(source, non_blocking=True), device)


def step_limit(subject: Subject, moved: StepBytes, rate: float, link: float | None) -> float:
    """Seconds of a decode step that reads the weights and `moved` bytes of the caches.

    rate: bytes a second on the device; link: from host memory, which is read beside the device's.
    """
    seconds = (subject.nbytes + moved.device) / rate
    return max(seconds, moved.host / link) if link else seconds


def cache_nbytes(decoder: Decoder, seq_len: float, batch: int, kept: float | None, hit: float) -> StepBytes | None:
    """Bytes that a step of `batch` sequences must read beside the weights, of all layers: the caches' own count.

    seq_len: past tokens. kept: share of them that sparse layers attend to; None if it is not known, and then so is the
    sum, unless no layer is sparse. hit: share of those that a GPU cache of host memory has. A layer that speculates
    reads its query weights a second time.
    """
    assert decoder.cache is not None, "allocate comes first"
    device = host = 0.0
    for layer, cache in enumerate(decoder.cache.layers):
        if cache.sparse and kept is None:
            return None
        moved = cache.step_nbytes(seq_len, seq_len * kept if cache.sparse and kept is not None else seq_len, hit)
        device += batch * moved.device
        host += batch * moved.host
        if cache.speculation_source is not None:
            device += decoder.query_nbytes(layer)
    return StepBytes(device, host)


def prompt_limit(subject: Subject, tokens: int) -> float:
    """Seconds of a prompt whose only work is its matrix products and its attention, both at torch's own speed."""
    shape, device = subject.architecture.shape, subject.device
    layer = subject.weights.layers[0]
    matrices = [layer.qkv, layer.output, layer.gate_up, layer.down]
    piece = min(tokens, 8192)  # a larger product is no faster, and takes memory
    inputs = [torch.randn(piece, matrix.shape[1], device=device, dtype=subject.dtype) for matrix in matrices]

    def products() -> None:
        for x, matrix in zip(inputs, matrices, strict=True):
            linear(x, matrix)

    def heads(count: int) -> Tensor:
        return torch.randn(count, tokens, shape.head_dim, device=device, dtype=subject.dtype)

    q, k, v = heads(shape.heads), heads(shape.kv_heads), heads(shape.kv_heads)
    of_layer = seconds_each(products, device) * tokens / piece
    of_layer += seconds_each(lambda: prompt_attention(q, k, v), device)
    return shape.layers * of_layer


def seconds_each(call: Callable[[], object], device: torch.device) -> float:
    """Mean seconds of a call, over calls that follow each other for _SECONDS, after a first one."""
    call()
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    number = max(1, round(_SECONDS / max(time.perf_counter() - began, 1e-6)))
    began = time.perf_counter()
    for _ in range(number):
        call()
    synchronize(device)
    return (time.perf_counter() - began) / number


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
