"""A checkpoint folder: its configuration, tokenizer, stop ids, fingerprint, and which files hold its weights."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from sparsecache.engine import catalog
from sparsecache.engine.families.base import Architecture
from sparsecache.engine.tokenization import find_stop_ids, load_tokenizer
from sparsecache.engine.weights import Weights, load_weights
from sparsecache.errors import UsageError, one_line

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in catalog.DTYPES}
_VOCABULARY = {"merges.txt", "vocab.txt"}
_SAMPLED_BYTES = 64 * 1024
_SAMPLES = 64


class Checkpoint:
    """A Hugging Face checkpoint folder, read without running any code from it."""

    def __init__(self, path: Path, allow_pickle: bool = False):
        """Reads the configuration only. Raises UsageError for one that transformers does not know."""
        self.path = path
        self._allow_pickle = allow_pickle
        try:
            self.config: Any = AutoConfig.from_pretrained(path, trust_remote_code=False)
            _apply_condensed_rope(self.config)
        except Exception as error:  # unknown, unreadable, or refused by transformers' own checks of each field
            raise UsageError(
                f"{path / 'config.json'} is no configuration that transformers knows without running code from the "
                f"checkpoint, which is never done here: {one_line(error)}"
            ) from error

    @property
    def model_type(self) -> str:
        """The `model_type` of config.json."""
        return str(self.config.model_type)

    @property
    def window(self) -> int | None:
        """Tokens the checkpoint is made for (`max_position_embeddings`); None if config.json does not say."""
        stated = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return None if stated is None else int(stated)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that config.json states; bfloat16 if it states none."""
        stated = str(getattr(self.config, "dtype", None) or torch.bfloat16).removeprefix("torch.")
        if stated not in DTYPES:
            raise UsageError(f"{self.path / 'config.json'} states dtype {stated}. Choose --dtype {', '.join(DTYPES)}.")
        return DTYPES[stated]

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer. Raises UsageError if transformers cannot make one of the folder."""
        return load_tokenizer(self.path)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Token ids that end a text (tokenization.find_stop_ids)."""
        return find_stop_ids(self.path, self.config, self.tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the configuration, the tokenizer and the weights.

        Of a file over 4 MiB only the size and 65 blocks of 64 KiB, spread evenly from the first to the last, are
        read, so that large checkpoints do not cost a minute each start: a small change between them goes unseen.
        """
        digest = hashlib.sha256()
        weights = {path.name for path in self._weight_files()}
        for path in sorted(self.path.iterdir()):
            described = path.name in weights | _VOCABULARY or path.suffix in (".json", ".model", ".jinja")
            if described and path.is_file():
                digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
                digest.update(_sampled(path))
        return digest.hexdigest()

    def load(
        self, architecture: Architecture, device: torch.device | Sequence[torch.device], dtype: torch.dtype
    ) -> Weights:
        """All weights on the device, or the layers in equal parts on several.

        Raises UsageError for a tensor that is missing, unexpected or misshapen.
        """
        devices = [device] if isinstance(device, torch.device) else device
        return load_weights(self._weight_files(), architecture, devices, dtype)

    def _weight_files(self) -> list[Path]:
        """The files that hold the weights; pickles only where they are allowed. Raises UsageError without any."""
        for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
            index = self.path / f"{stem}.{ending}.index.json"
            single = self.path / f"{stem}.{ending}"
            if index.is_file():
                names = _shards(index)
                missing = [name for name in names if not (self.path / name).is_file()]
                if missing and (ending != "bin" or self._allow_pickle):
                    raise UsageError(f"{self.path} lacks {', '.join(missing)}, named in {index.name}. Fetch it again.")
                files = [self.path / name for name in names]
            elif single.is_file():
                files = [single]
            else:
                continue
            if ending == "bin" and not self._allow_pickle:
                raise UsageError(
                    f"{self.path} holds its weights as pickle files ({single.name}) only. Convert them to "
                    f"safetensors, or pass --allow_pickle if you trust where they come from."
                )
            return files
        raise UsageError(
            f"{self.path} holds no weights: neither model.safetensors nor an index of shards. If its hub has pickle "
            f"files (.bin) only, --allow_pickle fetches and reads them."
        )


def _apply_condensed_rope(config: Any) -> None:
    """LongChat's own spelling of linear scaling, which transformers does not read."""
    ratio = getattr(config, "rope_condense_ratio", None)
    if ratio and config.rope_parameters.get("rope_type", "default") == "default":
        config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": float(ratio)}


def _shards(index: Path) -> list[str]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
        if not names:
            raise ValueError("it names no file")
        return names
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index} is no index of shards ({one_line(error)}). Fetch it again.") from error


def _sampled(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _SAMPLES * _SAMPLED_BYTES:
            return hashlib.sha256(file.read()).digest()
        digest = hashlib.sha256()
        for index in range(_SAMPLES + 1):
            file.seek((size - _SAMPLED_BYTES) * index // _SAMPLES)
            digest.update(file.read(_SAMPLED_BYTES))
        return digest.digest()
