"""Which checkpoint a `--model` value means: a table of configs/models.toml, a folder, or a hub id."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsecache.configs import project_dir, read_tables
from sparsecache.errors import UsageError


@dataclass(frozen=True)
class Model:
    """A checkpoint's address and settings (configs/models.toml says what each field means)."""

    name: str
    path: Path | None = None
    hub: str | None = None
    revision: str | None = None
    model_type: str | None = None
    max_length: int | None = None
    chat: str | None = None
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None
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


def checkpoint_folder(model: Model, offline: bool, allow_pickle: bool) -> Path:
    """The folder of a model's files, downloaded from the hub if need be (never with `offline`).

    Raises UsageError if it is not there or cannot be had.
    """
    if model.path is not None:
        if (model.path / "config.json").is_file():
            return model.path
        raise UsageError(f"{model.path} holds no config.json, so it is not a checkpoint folder ({model.name}).")
    assert model.hub is not None
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]
    try:
        return Path(
            snapshot_download(
                model.hub,
                revision=model.revision,
                local_files_only=offline,
                allow_patterns=patterns + (["*.bin"] if allow_pickle else []),
                ignore_patterns=["*/*", "consolidated*"],  # the same weights once more, in other formats
            )
        )
    except Exception as error:  # the client's many failures (network, status, gate, cache) all mean: not there
        way_out = "Run once without --offline" if offline else "Check the name, the network and your access"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"Checkpoint {model.hub} could not be had ({reason}). {way_out}, or give the path of a folder as --model."
        ) from error


def _table_of(name: str) -> str | None:
    tables = read_tables("models.toml")
    for key in model_names():
        if name in (key, tables[key].get("hub", "").split("/")[-1]):
            return key
    return None


def _with_settings(name: str, key: str | None, *, path: Path | None, hub: str | None) -> Model:
    tables = read_tables("models.toml")
    table = tables[key] if key else {}
    arguments = {
        **tables.get("default", {}).get("chat_template_args", {}),
        **table.get("chat_template_args", {}),
    }
    settings = {field: table.get(field) for field in ("model_type", "max_length", "chat", "dtype", "note", "revision")}
    return Model(name=name, path=path, hub=hub, chat_template_args=arguments, table=key, **settings)
