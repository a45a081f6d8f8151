"""The roofline: the least time that the machine's measured rates allow for a step or a prompt.

Rates are means over about _SECONDS, since a shorter measurement shows the clock rate of a cool chip.
"""

import time
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from sparsecache.bench.models import BenchModel
from sparsecache.cache.base import StepBytes
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.devices import synchronize
from sparsecache.kernels.attention import prompt_attention
from sparsecache.kernels.fp8 import Fp8Matrix, Matrix, quantise
from sparsecache.kernels.linear import linear

_SECONDS = 2.0
_COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}


class Rates:
    """Measured rates in bytes per second.

    copy: read and written by a large copy within the device. link: from pinned host memory to the device, measured on
    first use.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.copy = _copy_rate(device)

    @cached_property
    def link(self) -> float | None:
        """Return the rate from host memory; None on a CPU."""
        return _link_rate(self._device) if self._device.type == "cuda" else None


def decode_step_nbytes(
    decoder: Decoder, seq_len: float, batch: int, kept: float | None, cache_hit: float
) -> StepBytes | None:
    """Return the bytes that a decode step must read beside the weights; None if they are not known.

    seq_len: past tokens of each sequence. kept: the share of them that sparse layers attend to, None if the method does
    not report it. cache_hit: as in `LayerCache.step_nbytes`. A speculating layer reads its query weights twice.
    """
    assert decoder.cache is not None, "call allocate first"
    device = host = 0.0
    for layer, cache in enumerate(decoder.cache.layers):
        share = kept if cache.sparse else 1.0
        if share is None:
            return None
        nbytes = cache.step_nbytes(seq_len, share * seq_len, cache_hit)
        device += batch * nbytes.device
        host += batch * nbytes.host
        if cache.speculation_source is not None:
            device += decoder.query_nbytes(layer)
    return StepBytes(device, host)


def decode_step_s(weight_nbytes: int, cache: StepBytes, rates: Rates) -> float:
    """Return the least seconds of a decode step; the link and a GPU's memory are read at the same time."""
    device = weight_nbytes + cache.device
    if not cache.host:
        return device / rates.copy
    if rates.link is None:  # on a CPU host memory is the device's
        return (device + cache.host) / rates.copy
    return max(device / rates.copy, cache.host / rates.link)


def prefill_s(model: BenchModel, tokens: int) -> float:
    """Return the seconds of a prompt's matrix products and attention, each at the rate that torch reaches alone."""
    shape, device = model.architecture.shape, model.device
    layer = model.weights.layers[0]
    matrices = [layer.qkv, layer.output, layer.gate_up, layer.down]
    rows = min(tokens, 8192)  # a larger product is no faster, and takes memory
    inputs = [_rows_for(matrix, rows, model.dtype) for matrix in matrices]

    def products() -> None:
        for x, matrix in zip(inputs, matrices, strict=True):
            linear(x, matrix)

    def heads(count: int) -> Tensor:
        return torch.randn(count, tokens, shape.head_dim, device=device, dtype=model.dtype)

    q, k, v = heads(shape.heads), heads(shape.kv_heads), heads(shape.kv_heads)
    layer_s = _seconds_per_call(products, device) * tokens / rows
    layer_s += _seconds_per_call(lambda: prompt_attention(q, k, v), device)
    return shape.layers * layer_s


def _rows_for(matrix: Matrix, rows: int, dtype: torch.dtype) -> Matrix:
    x = torch.randn(rows, matrix.shape[1], device=matrix.device, dtype=dtype)
    return quantise(x) if isinstance(matrix, Fp8Matrix) else x


def _copy_rate(device: torch.device) -> float:
    size = _COPY_BYTES[device.type]
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds_per_call(lambda: target.copy_(source), device)


def _link_rate(device: torch.device) -> float:
    source = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(2**30, dtype=torch.uint8, device=device)
    return 2**30 / _seconds_per_call(lambda: target.copy_(source, non_blocking=True), device)


def _seconds_per_call(call: Callable[[], object], device: torch.device) -> float:
    """Return the mean seconds of a call over back-to-back calls for _SECONDS, after a first one."""
    call()
    synchronize([device])
    began = time.perf_counter()
    call()
    synchronize([device])
    number = max(1, round(_SECONDS / max(time.perf_counter() - began, 1e-6)))
    began = time.perf_counter()
    for _ in range(number):
        call()
    synchronize([device])
    return (time.perf_counter() - began) / number
