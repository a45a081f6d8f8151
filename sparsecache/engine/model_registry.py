"""Find the checkpoint of a `--model` value: a folder, a GGUF file, a name in configs/models.toml, or a hub id."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsecache.configs import project_dir, read_tables
from sparsecache.errors import UsageError, one_line

DTYPES = ("bfloat16", "float16", "float32", "fp8")
_MIN_LENGTH = 32  # tokens; a shorter window cuts the question off every LongBench prompt
_MAX_LENGTH = 2**31


@dataclass(frozen=True)
class Model:
    """The location and settings of a checkpoint. configs/models.toml describes the fields."""

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
    """Return the names of all tables of models.toml."""
    return [name for name in _tables() if name != "default"]


def find_model(text: str) -> Model:
    """Return the model of a `--model` value.

    The value is, in this order, an existing GGUF file or folder, the name of a table, or a hub id with one slash. Two
    exceptions: the name of a table with a `path` (demo) always means that table, and a folder with the name of a hub
    table counts only if it is a checkpoint. A file, folder or hub id takes the settings of the table whose name, or
    last part of `hub`, is its own last part. Raises UsageError, with the names, for anything else.
    """
    path, tables = Path(text), _tables()
    is_name = text in tables and text != "default"
    if text.endswith(".gguf") and os.path.lexists(text):
        return _gguf_model(path)
    if text and path.is_dir() and not (is_name and ("path" in tables[text] or not _is_checkpoint(path))):
        if not (path / "config.json").exists() and (files := sorted(path.glob("*.gguf"))):
            if len(files) > 1:
                raise UsageError(
                    f"{path} holds {len(files)} GGUF files ({', '.join(file.name for file in files[:4])}"
                    f"{', ...' * (len(files) > 4)}). Pass one of them, such as --model {files[0]}."
                )
            return _gguf_model(files[0])
        name = os.path.basename(os.path.abspath(path))  # without resolving links
        return _with_settings(name, _find_table(name), path=path, hub=None)
    if is_name:
        local = project_dir() / tables[text]["path"] if "path" in tables[text] else None
        return _with_settings(text, text, path=local, hub=tables[text].get("hub"))
    if text.endswith(".gguf"):
        raise UsageError(
            f"--model {text!r}: there is no such file. scripts/fetch_model.py downloads one and prints its path."
        )
    if text.count("/") == 1 and all(text.split("/")) and not text.startswith((".", "/", "~")):
        name = text.split("/")[1]
        return _with_settings(name, _find_table(name), path=None, hub=text)
    hint = f" scripts/fetch_model.py {text} downloads it and prints its path." * (text in read_tables("downloads.toml"))
    raise UsageError(
        f"--model {text!r} is neither a folder, nor a .gguf file, nor a name of configs/models.toml "
        f"({', '.join(model_names())}), nor a hub id (owner/name).{hint}"
    )


def _gguf_model(path: Path) -> Model:
    return _with_settings(path.stem, _find_table(path.stem), path=path, hub=None)


def _is_checkpoint(path: Path) -> bool:
    return (path / "config.json").exists() or any(path.glob("*.gguf"))


_DESCRIPTION = ["*.json", "tokenizer.model", "*.txt", "*.jinja"]
_WEIGHTS = ["*.safetensors"]
_PICKLES = ["*.bin"]


def checkpoint_folder(model: Model, offline: bool, *, weights: bool = False, allow_pickle: bool = False) -> Path:
    """Return a model's folder or GGUF file; a hub model is downloaded unless it is cached.

    offline: do not download. weights: fetch weights too, not only configuration and tokenizer. Raises UsageError if the
    download fails.
    """
    if model.path is not None:
        return model.path
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
                ignore_patterns=["*/*", "consolidated*"],  # the same weights in other formats
            )
        )
    except Exception as error:  # network, HTTP status, gated repository or cache
        hint = "Run once without --offline" if offline else "Check the name, the network and your access"
        raise UsageError(
            f"Could not download the checkpoint {model.hub} ({one_line(error)}). {hint}, or pass the path of a "
            f"folder or .gguf file as --model."
        ) from error


def _find_table(name: str) -> str | None:
    """Return the table whose name, or last part of `hub`, is `name`. Tables with a `path` do not count."""
    for key, table in _tables().items():
        if key != "default" and "path" not in table and name in (key, table.get("hub", "").split("/")[-1]):
            return key
    return None


def _with_settings(name: str, key: str | None, *, path: Path | None, hub: str | None) -> Model:
    tables = _tables()
    table = dict(tables[key]) if key else {}
    if hub != table.get("hub"):  # a revision belongs to its repository
        table.pop("revision", None)
    arguments = {**tables.get("default", {}).get("chat_template_args", {}), **table.get("chat_template_args", {})}
    return Model(**{**table, "name": name, "table": key, "path": path, "hub": hub, "chat_template_args": arguments})


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and "\0" not in value


def _is_length(value: Any) -> bool:
    return type(value) is int and _MIN_LENGTH <= value <= _MAX_LENGTH


# Per field of a table: the check of its value, and what is allowed.
_LENGTH = (_is_length, f"a whole number from {_MIN_LENGTH} to {_MAX_LENGTH}")
_TEXT = (_is_text, "a text")
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "path": _TEXT,
    "hub": (lambda value: _is_text(value) and value.count("/") == 1 and all(value.split("/")), "a hub id (owner/name)"),
    "revision": _TEXT,
    "model_type": _TEXT,
    "window": _LENGTH,
    "max_length": _LENGTH,
    "chat": (
        lambda value: _is_text(value) and (value in ("template", "none") or "{prompt}" in value),
        '"template", "none", or a text with {prompt} in it',
    ),
    "chat_template_args": (lambda value: isinstance(value, dict), "a table"),
    "dtype": (lambda value: value in DTYPES, f"one of {', '.join(DTYPES)}"),
    "data": _TEXT,
    "note": _TEXT,
}


def _tables() -> dict[str, dict[str, Any]]:
    """Return the tables of models.toml. Raises UsageError for a broken file, an unknown field or a wrong value."""
    try:
        tables = read_tables("models.toml")
    except (OSError, ValueError, RecursionError) as error:  # missing, not UTF-8, not TOML
        raise UsageError(f"configs/models.toml cannot be read: {one_line(error)}.") from error
    for key, table in tables.items():
        _check_table(key, table)
    return tables


def _check_table(key: str, table: Any) -> None:
    where = f"Table [{key}] of configs/models.toml"
    if not isinstance(table, dict):
        raise UsageError(f"configs/models.toml has the field {key!r} outside a table; put it into one.")
    allowed = ["chat_template_args"] if key == "default" else list(_FIELDS)
    if unknown := sorted(table.keys() - set(allowed)):
        raise UsageError(f"{where} has unknown fields: {', '.join(unknown)}. Fields: {', '.join(sorted(allowed))}.")
    for name, value in table.items():
        fits, what = _FIELDS[name]
        if not fits(value):
            raise UsageError(f"{where}: {name} = {str(value)[:80]!r} must be {what}.")
    if key != "default" and ("path" in table) == ("hub" in table):
        raise UsageError(f"{where} must have either path or hub.")
