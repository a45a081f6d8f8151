"""Calibrate methods, and store the result in a file for later runs.

The file is keyed by the checkpoint's fingerprint, the tokens of the text, the dtype, the shape, the method and the
version of its calibration. It is in `calibration/` of the cache folder (files.cache_folder).
"""

import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sparsecache.cache import CacheMethod, Shape
from sparsecache.engine.decoder import Decoder
from sparsecache.errors import UsageError, one_line
from sparsecache.files import cache_folder, open_regular

if TYPE_CHECKING:
    from sparsecache.engine.general import CachedModel

MOST_TOKENS = 2048
Calibrations = dict[str, dict[str, Tensor]]
"""Calibrations in memory, by the keys of their files."""


def calibrate(
    method: CacheMethod,
    decoder: "Decoder | CachedModel",
    token_ids: list[int],
    fingerprint: str,
    known: Calibrations | None = None,
) -> None:
    """Calibrate the method with the first 2,048 of `token_ids`, or restore an earlier calibration.

    An earlier calibration is in `known`, to which this one is added, or in its file. Raises UsageError for a file that
    does not fit the checkpoint or holds NaN or infinite values, and if the checkpoint's own calibration does.
    """
    token_ids = token_ids[:MOST_TOKENS]
    key = _key(method, token_ids, fingerprint, str(decoder.dtype), decoder.shape)
    file = cache_folder() / "calibration" / f"{key[:32]}.safetensors"
    if known is not None and key in known:
        method.restore(known[key], decoder.shape)
        return
    if os.path.exists(file):  # unlike Path.exists, it raises nothing for a folder that may not be searched
        try:
            tensors = _load(file, key)
            method.restore(tensors, decoder.shape)
        except (UsageError, ValueError, OSError, SafetensorError) as error:
            problem = one_line(error).rstrip(".")
            raise UsageError(
                f"The calibration in {file} cannot be used: {problem}. Delete the file; the next run calibrates again."
            ) from error
        if known is not None:
            known[key] = tensors
        return
    bar = tqdm(total=decoder.shape.layers, desc="Calibration", unit="layer", leave=False, disable=None)
    try:
        with bar, torch.inference_mode():
            decoder.calibrate(torch.tensor(token_ids, device=decoder.device), bar.update)
        tensors = method.calibration()
        failure = _not_finite(tensors)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # decomposing what is not finite
        failure = one_line(error)
    if failure is not None:
        raise UsageError(
            f"The calibration of this checkpoint failed: {failure}. Its weights or config.json are broken, or values "
            f"overflow the dtype: try --dtype float32."
        )
    if known is not None:
        known[key] = tensors
    _save(file, tensors, key)


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Return a message that names a tensor with NaN or infinite values; None if there is none."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"NaN or infinite values ({name})"
    return None


def _key(method: CacheMethod, token_ids: list[int], fingerprint: str, dtype: str, shape: Shape) -> str:
    parts = (method.calibration_name, fingerprint, dtype, str(shape), " ".join(map(str, token_ids)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _load(file: Path, key: str) -> dict[str, Tensor]:
    open_regular(file).close()  # safetensors would wait for the writer of a named pipe
    with safe_open(file, framework="pt") as opened:
        if (opened.metadata() or {}).get("key") != key:
            raise ValueError("it belongs to another checkpoint, text or version.")
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dict)
    if problem := _not_finite(tensors):
        raise ValueError(f"it holds {problem}.")
    return tensors


def _save(file: Path, tensors: dict[str, Tensor], key: str) -> None:
    """Write the file whole or not at all; where it cannot be written, the next run calibrates again."""
    if not tensors:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
            unfinished = Path(temporary) / file.name
            save_file(tensors, unfinished, metadata={"key": key})
            unfinished.replace(file)
    except (OSError, SafetensorError) as error:
        print(
            f"Warning: the calibration could not be written to {file} ({one_line(error)}), so every run calibrates.",
            file=sys.stderr,
        )
