"""Decides whether two runs may be gated against each other.

Everything in run.json's identity must be the same except MAY_DIFFER: data, templates and protocol of every shared
dataset, checkpoint, window, prompt length, chat wrapper, stop ids. So must the prompts of shared rows, the metrics and
the scorer's options, and for a speed the device, the batch size, the dtype and the rows.
"""

from collections.abc import Iterator
from typing import Any

from sparsecache.longbench.baseline import Baseline, same_prompt
from sparsecache.longbench.identity import HASHED
from sparsecache.longbench.run_record import BY_DATASET

TOKENIZED_BY = ("transformers", "tokenizers", "probe_ids_sha256")
"""What the token ids of prompts depend on. The rows' own hashes tell whether they differ."""
_ADDED = ("chat_wrapper", "chat_clock")
"""Keys that older run.json files lack: compared where both have them."""
MAY_DIFFER = ("method", "options", "calibration_sha256", "engine", "dtype", *TOKENIZED_BY)


def mismatches(run: Baseline, baseline: Baseline) -> Iterator[str]:
    """Yields the differences that are not allowed, as parts of a sentence."""
    stems = [stem for stem in run.datasets if stem in baseline.datasets]
    unknown = [side.name for side in (run, baseline) if not side.identity]
    yield from (f"no run.json says how {name} was made" for name in unknown)
    if not unknown:
        yield from _identities(run.identity, baseline.identity, stems)
    yield from _tables("the scorer's choice of ", run.scoring, baseline.scoring)
    for stem in stems:
        mine, theirs = run.datasets[stem], baseline.datasets[stem]
        if mine.metric != theirs.metric:
            yield _describe(f"the metric of {stem}", mine.metric, theirs.metric)
        shared = mine.prompts.keys() & theirs.prompts.keys()
        other = sum(not same_prompt(mine.prompts[row], theirs.prompts[row]) for row in shared)
        if other:
            yield f"the prompts of {other} rows of {stem}"


def speed_mismatches(run: Baseline, baseline: Baseline) -> Iterator[str]:
    """Yields what differs, or is mixed, so that decode speeds cannot be compared."""
    for what, mine, theirs in (
        ("the device", run.devices, baseline.devices),
        ("the batch size", run.batch_sizes, baseline.batch_sizes),
        ("the dtype", [run.identity.get("dtype")], [baseline.identity.get("dtype")]),
    ):
        if mine != theirs or len(mine) != 1:
            yield _describe(what, _listed(mine), _listed(theirs))
    rows = [{stem: set(dataset.scores) for stem, dataset in side.datasets.items()} for side in (run, baseline)]
    if rows[0] != rows[1]:
        yield "the rows that the speed was measured on"


def allowed_differences(run: Baseline, baseline: Baseline) -> Iterator[str]:
    """Yields the differences that are allowed, besides the method and its options."""
    for key in ("engine", "dtype", "transformers", "tokenizers"):
        mine, theirs = run.identity.get(key), baseline.identity.get(key)
        if mine != theirs:
            yield _describe(f"the {key}", mine, theirs)


def _identities(mine: dict[str, Any], theirs: dict[str, Any], stems: list[str]) -> Iterator[str]:
    left_out = {*MAY_DIFFER, *BY_DATASET, *(key for key in _ADDED if key not in mine or key not in theirs)}
    for key in dict.fromkeys([*mine, *theirs]):
        if key not in left_out and (key not in mine or key not in theirs or mine[key] != theirs[key]):
            yield _difference(key, "", mine.get(key), theirs.get(key))
    for key in BY_DATASET:
        for stem in stems:
            values = [table.get(key, {}).get(stem) for table in (mine, theirs)]
            if None in values or values[0] != values[1]:
                yield _difference(key, f" of {stem}", *values)


def _tables(what: str, mine: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*mine, *theirs]):
        if key not in mine or key not in theirs or mine[key] != theirs[key]:
            yield _describe(f"{what}{key}", mine.get(key), theirs.get(key))


def _difference(key: str, of: str, mine: Any, theirs: Any) -> str:
    """A phrase on one key of two identities. Hashes are not shown, and of tables only the entries that differ."""
    if key in HASHED and None not in (mine, theirs):
        return f"{HASHED[key]}{of}"
    if isinstance(mine, dict) and isinstance(theirs, dict):
        names = [name for name in dict.fromkeys([*mine, *theirs]) if mine.get(name) != theirs.get(name)]
        return " and ".join(_describe(f"{name} of {key}{of}", mine.get(name), theirs.get(name)) for name in names)
    shown = [value if value is None or key not in HASHED else "known" for value in (mine, theirs)]
    return _describe(f"the {key}{of}", *shown)


def _describe(what: str, mine: Any, theirs: Any) -> str:
    return f"{what} ({_short(mine)}, baseline {_short(theirs)})"


def _short(value: Any) -> str:
    text = "unknown" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:12]}..."


def _listed(values: list[Any]) -> str | None:
    return " and ".join(str(value) for value in values if value is not None) or None
