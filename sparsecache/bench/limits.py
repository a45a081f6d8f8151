"""What the machine could do at best, measured in the same run: copies, products at the model's shapes, attention.

Every rate is a mean over about `_SECONDS`, since a rate over less says what a cool chip does.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsecache.bench.models import Subject
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


def step_limit(subject: Subject, tokens: int, batch: int, rate: float, link: float | None = None) -> float:
    """Seconds of a decode step at `rate` bytes a second: weights once, keys and values of every sequence.

    link: the rate at which keys and values come instead, beside the weights, where they are in host memory.
    """
    cache = batch * tokens * subject.kv_nbytes
    return max(subject.nbytes / rate, cache / link) if link else (subject.nbytes + cache) / rate


def sparse_limit(
    subject: Subject,
    tokens: int,
    batch: int,
    rate: float,
    link: float | None,
    options: dict[str, Any],
    kept: float,
    hit: float,
) -> float:
    """The same of InfiniGen: the sparse layers read their partial keys, what they fetch, and the next query weights.

    options: the method's; kept: the share of the past that was attended to; hit: that of it that was on the GPU.
    """
    shape, layers = subject.architecture.shape, subject.weights.layers
    sparse = shape.layers - options["dense_layers"]
    columns = min(32, shape.head_dim) / shape.head_dim if (ratio := options["partial_weight_ratio"]) is None else ratio
    of_layer = batch * tokens * subject.kv_nbytes / shape.layers
    query = layers[0].qkv.nbytes * shape.heads // (shape.heads + 2 * shape.kv_heads)
    read = sparse * kept * of_layer
    on_device = subject.nbytes + sparse * (query + columns / 2 * of_layer) + options["dense_layers"] * of_layer
    seconds: float = max((on_device + read) / rate, (1 - hit) * read / link) if link else (on_device + read) / rate
    return seconds


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
