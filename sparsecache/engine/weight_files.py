"""Find the weight files of a checkpoint folder. Reads the index of shards, but no weights."""

import os
from pathlib import Path

from sparsecache.engine.config_checks import read_json
from sparsecache.engine.weight_formats import describe_folder
from sparsecache.errors import UsageError

_FORMATS = (("model", "safetensors"), ("pytorch_model", "bin"))


def find_weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """Return a folder's weight files: safetensors if there are any, else pickles.

    All are regular files in the folder itself, or links to such files, as in the hub's cache. Raises UsageError for a
    folder without weights or with two sets, for pickles without allow_pickle, and for an index that names other files.
    """
    for stem, suffix in _FORMATS:
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if not os.path.lexists(single) and not os.path.lexists(index):
            continue
        if suffix == "bin" and not allow_pickle:
            raise UsageError(
                f"{folder} holds its weights as pickle files ({single.name}) only. Convert them to safetensors, or "
                f"pass --allow_pickle if you trust their source."
            )
        names = _shards(index, suffix) if os.path.lexists(index) else [single.name]
        if os.path.lexists(single) and names != [single.name]:
            raise UsageError(
                f"{folder} holds two sets of weights: {single.name}, and the shards of {index.name}. transformers "
                f"reads the first and ignores the second. Remove one of the two sets."
            )
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise UsageError(f"{folder} lacks {', '.join(missing[:5])}, named in {index.name}. Download it again.")
        for name in names:
            if not (folder / name).is_file():
                raise UsageError(f"{folder / name} is not a regular file. Download it again.")
        return [folder / name for name in names]
    raise UsageError(
        f"{describe_folder(folder)} Weights are read from model.safetensors, its shards, a .gguf file, or with "
        f"--allow_pickle from pytorch_model.bin."
    )


def _shards(index: Path, suffix: str) -> list[str]:
    """Return the sorted file names in an index. Raises UsageError for a path, or another format's file."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{index} is not an index of shards: it has no weight_map. Download it again.")
    names = set(weight_map.values()) if all(isinstance(name, str) for name in weight_map.values()) else {""}
    for name in names:
        if os.path.basename(name) != name or name in ("", ".", "..") or "\0" in name or "\\" in name:
            raise UsageError(f"{index} names {name!r}. A shard must be a file in the same folder.")
        if not name.endswith(f".{suffix}"):
            raise UsageError(f"{index} names {name!r}. Its shards must be .{suffix} files.")
    return sorted(names)
