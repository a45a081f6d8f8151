"""Which checkpoint a `--model` value means: a table of configs/models.toml, a folder, or a hub id."""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sparsecache.configs import project_dir, read_tables
from sparsecache.errors import UsageError, one_line

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Model:
    """A checkpoint's address and settings (configs/models.toml says what each field means)."""

    name: str
    path: Path | None = None
    hub: str | None = None
    revision: str | None = None
    model_type: str | None = None
    window: int | None = None
    max_length: int | None = None
    chat: str | None = None
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    data: str | None = None
    note: str | None = None
    table: str | None = None


def model_names() -> list[str]:
    """The names of all tables of models.toml."""
    return [name for name in read_tables("models.toml") if name != "default"]


def find_model(text: str) -> Model:
    """The model that `--model` names.

    A folder comes first, then a table's name, then anything with one slash as a hub id. A folder or hub id
    whose last part is a table's name, or the last part of a table's `hub`, takes that table's settings.
    Raises UsageError, listing the names, for anything else.
    """
    path = Path(text)
    if text and path.is_dir():
        name = os.path.basename(os.path.abspath(path))  # the name as typed, where it is a link
        return _with_settings(name, _table_of(name), path=path, hub=None)
    if text in model_names():
        table = read_tables("models.toml")[text]
        local = project_dir() / table["path"] if "path" in table else None
        return _with_settings(text, text, path=local, hub=table.get("hub"))
    if text.count("/") == 1 and all(text.split("/")) and not text.startswith((".", "/", "~")):
        name = text.split("/")[1]
        return _with_settings(name, _table_of(name), path=None, hub=text)
    raise UsageError(
        f"--model {text!r} is neither a folder, nor a name of configs/models.toml "
        f"({', '.join(model_names())}), nor a hub id (owner/name)."
    )


_DESCRIPTION = ["*.json", "tokenizer.model", "*.txt", "*.jinja"]
_WEIGHTS = ["*.safetensors"]
_PICKLES = ["*.bin"]


def checkpoint_folder(model: Model, offline: bool, *, weights: bool = False, allow_pickle: bool = False) -> Path:
    """The folder of a model's files, downloaded from the hub if need be (never with `offline`).

    Without `weights` only what describes the checkpoint is fetched. Raises UsageError if it is not there or
    cannot be had.
    """
    if model.path is not None:
        if (model.path / "config.json").is_file():
            return model.path
        raise UsageError(
            f"{model.path} holds no config.json, so it is not a checkpoint folder ({model.name}). Name another one; "
            f"the bundled one is called demo, and one to try things with is made by "
            f"python -m sparsecache.testing.random_checkpoint FOLDER."
        )
    assert model.hub is not None
    from huggingface_hub import snapshot_download

    patterns = [*_DESCRIPTION, *(_WEIGHTS if weights else []), *(_PICKLES if weights and allow_pickle else [])]
    try:
        return Path(
            snapshot_download(
                model.hub,
                revision=model.revision,
                local_files_only=offline,
                allow_patterns=patterns,
                ignore_patterns=["*/*", "consolidated*"],  # the same weights once more, in other formats
            )
        )
    except Exception as error:  # the client's many failures (network, status, gate, cache) all mean: not there
        way_out = "Run once without --offline" if offline else "Check the name, the network and your access"
        raise UsageError(
            f"Checkpoint {model.hub} could not be had ({one_line(error)}). {way_out}, or give the path of a folder "
            f"as --model."
        ) from error


def _table_of(name: str) -> str | None:
    """The table whose name or hub's last part is `name`; a table with a `path` describes that folder only."""
    tables = read_tables("models.toml")
    for key in model_names():
        if "path" not in tables[key] and name in (key, tables[key].get("hub", "").split("/")[-1]):
            return key
    return None


def _with_settings(name: str, key: str | None, *, path: Path | None, hub: str | None) -> Model:
    tables = read_tables("models.toml")
    table = dict(tables[key]) if key else {}
    known = {field.name for field in fields(Model)} - {"name", "table"}
    if unknown := table.keys() - known:
        raise UsageError(
            f"Table [{key}] of configs/models.toml has unknown fields: {', '.join(sorted(unknown))}. "
            f"Fields: {', '.join(sorted(known))}."
        )
    if table.get("dtype") not in (None, *DTYPES):
        raise UsageError(f"Table [{key}] of configs/models.toml: {table['dtype']!r} is none of {', '.join(DTYPES)}.")
    if hub != table.get("hub"):  # the same name elsewhere: another repository has other revisions
        table.pop("revision", None)
    arguments = {**tables.get("default", {}).get("chat_template_args", {}), **table.get("chat_template_args", {})}
    return Model(**{**table, "name": name, "table": key, "path": path, "hub": hub, "chat_template_args": arguments})
