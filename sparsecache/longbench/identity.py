"""Says in words how two runs' identities differ: values by name, never hashes or whole tables."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from sparsecache.errors import short
from sparsecache.longbench.run_record import BY_DATASET

_SHOWN = 40  # characters; a longer value is a text that would hide the difference
HASHED = {
    "checkpoint": "the checkpoint's files",
    "calibration_sha256": "the calibration text",
    "probe_ids_sha256": "the token ids that the tokenizer gives a test text",
    "chat_wrapper": "the rendered chat wrapper",
    "templates": "the prompt template",
    "data": "the data",
}
"""What stands for each value that is a hash or a long text."""
_CONTENT = re.compile(r"(@|sha256:)[0-9a-f]{16}")
"""The hash of a file that an option names."""


def method_labels(methods: Sequence[str]) -> list[str]:
    """Return names of methods to show together: without the hash of their files, where names stay distinct."""
    labels = {method: re.sub(r"@[0-9a-f]{16}$", "", method) for method in methods}
    shown = list(labels.values())
    return [labels[method] if shown.count(labels[method]) == 1 else method for method in methods]


def identity_differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Yields a phrase per difference, as in `alpha: 5.0, now 0.0`. Tables by dataset are compared where both have it.

    A key that `old` lacks is a difference: an earlier version did not record it.
    """
    old = _with_calibration_content(old)
    for key, value in new.items():
        if key not in old:
            yield f"{HASHED.get(key, key)}: not recorded"
        elif key in BY_DATASET:
            for stem in sorted(old[key].keys() & value.keys()):
                yield from _differences(key, old[key][stem], value[stem], f" of {stem}")
        else:
            yield from _differences(key, old[key], value)


def _differences(key: str, old: Any, new: Any, of: str = "") -> Iterator[str]:
    if old == new:
        return
    if key in HASHED:
        yield f"{HASHED[key]}{of}: not the same"
        return
    if key == "protocol":
        old, new = _protocol(old), _protocol(new)
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            if old.get(name) != new.get(name) or (name in old) != (name in new):
                yield _file_difference(name, old.get(name), new.get(name)) or (
                    f"{name}{of}: {_value(old, name)}, now {_value(new, name)}"
                )
    else:
        yield _file_difference(key, old, new) or f"{key}{of}: {_shown(old)}, now {_shown(new)}"


def _with_calibration_content(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity whose option calibration_file is the hash of the file, which earlier versions recorded apart."""
    options, text = identity.get("options"), identity.get("calibration_sha256")
    if not (isinstance(text, str) and isinstance(options, dict) and options.get("calibration_file")):
        return identity
    return {**identity, "options": {**options, "calibration_file": f"sha256:{text[:16]}"}}


def _file_difference(name: str, old: Any, new: Any) -> str | None:
    """The difference of an option that names a file; None if more than the file's content differs, or no file."""
    if not (isinstance(old, str) and isinstance(new, str) and _CONTENT.search(new)):
        return None
    if _CONTENT.sub("", old) == _CONTENT.sub("", new):
        return f"the content of the file that {name} names: not the same"
    names_file = _CONTENT.match(new) or "." in old.partition(",")[0]
    if names_file and not _CONTENT.search(old):
        return f"the content of the file that {name} names: not recorded by an earlier version"
    return None


def _protocol(text: str) -> Any:
    """The parts of a protocol, `max_new_tokens=128 chat=True`, as a table; the text itself if it has none."""
    parts = [part.partition("=") for part in text.split()]
    return {name: value for name, _, value in parts} if all(equals for _, equals, _ in parts) else text


def _value(table: dict[str, Any], name: str) -> str:
    return _shown(table[name]) if name in table else "not given"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return short(_CONTENT.sub(_without_hash, value) if isinstance(value, str) else value, _SHOWN)


def _without_hash(found: re.Match[str]) -> str:
    return "" if found[1] == "@" else "a file"
