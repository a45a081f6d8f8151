"""What a method learned from its calibration text, kept in a file from run to run.

The file is keyed by the checkpoint's fingerprint, the tokens of the text, the dtype, the method and the version of
its calibration. It lies in $SPARSECACHE_CACHE, or else in sparsecache/ of the user's cache folder.
"""

import hashlib
import os
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sparsecache.cache import CacheMethod
from sparsecache.engine.decoder import Decoder
from sparsecache.errors import UsageError, one_line
from sparsecache.files import cache_folder

MOST_TOKENS = 2048


def calibrate(method: CacheMethod, decoder: Decoder, token_ids: list[int], fingerprint: str) -> None:
    """Shows the method its calibration text (the first 2,048 of `token_ids`), or what it learned of it before.

    Raises UsageError for a kept file that does not fit the checkpoint; it is never used.
    """
    token_ids = token_ids[:MOST_TOKENS]
    key = _key(method, token_ids, fingerprint, str(decoder.dtype))
    file = cache_folder() / "calibration" / f"{key[:32]}.safetensors"
    if os.path.exists(file):  # unlike Path.exists, no error where a folder may not be searched
        try:
            method.restore(_load(file, key), decoder.shape)
        except (ValueError, OSError, SafetensorError) as error:
            problem = one_line(error).rstrip(".")
            raise UsageError(
                f"The calibration in {file} does not fit this checkpoint: {problem}. Delete the file; it is made anew."
            ) from error
        return
    with tqdm(total=decoder.shape.layers, desc="Calibration", unit="layer", leave=False) as bar, torch.inference_mode():
        decoder.calibrate(torch.tensor(token_ids, device=decoder.device), bar.update)
    _save(file, method.calibration(), key)


def _key(method: CacheMethod, token_ids: list[int], fingerprint: str, dtype: str) -> str:
    name = f"{type(method).__module__}.{type(method).__qualname__}"
    parts = (name, str(method.calibration_version), fingerprint, dtype, " ".join(map(str, token_ids)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _load(file: Path, key: str) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        if (opened.metadata() or {}).get("key") != key:
            raise ValueError("it was made of another checkpoint, text or version.")
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dict)


def _save(file: Path, tensors: dict[str, Tensor], key: str) -> None:
    """Writes the file whole or not at all; where it cannot be written, the next run calibrates again."""
    if not tensors:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
            unfinished = Path(temporary) / file.name
            save_file(tensors, unfinished, metadata={"key": key})
            unfinished.replace(file)
    except (OSError, SafetensorError) as error:
        warning = f"Warning: the calibration could not be kept in {file} ({one_line(error)}); every run makes it anew."
        tqdm.write(warning, file=sys.stderr)
