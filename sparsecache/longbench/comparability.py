"""Whether two runs may be gated against each other: what must be alike, and what of them is the very question.

Alike must be: the data (SHA-256 of each file), templates and protocol of every shared dataset, the prompts of every
shared row, the checkpoint's fingerprint, window, prompt length, chat wrapping, stop ids, the metrics and the scorer's
choices; everything in run.json's identity but MAY_DIFFER. For a speed also the device, the batch size, the dtype and
the rows.
"""

from collections.abc import Iterator
from typing import Any

from sparsecache.longbench.baseline import Baseline, same_prompt
from sparsecache.longbench.run_record import BY_DATASET

TOKENIZED_BY = ("transformers", "tokenizers", "probe_ids_sha256")
"""What the tokens of prompts depend on; the rows' own hashes say whether they differ."""
_ADDED = ("chat_wrapper", "chat_clock")
"""What older run.json files lack: compared where both have it."""
MAY_DIFFER = ("method", "options", "calibration_sha256", "engine", "dtype", *TOKENIZED_BY)


def mismatches(run: Baseline, baseline: Baseline) -> Iterator[str]:
    """What differs that must not, as parts of a sentence."""
    stems = [stem for stem in run.datasets if stem in baseline.datasets]
    unknown = [side.name for side in (run, baseline) if not side.identity]
    yield from (f"no run.json says how {name} was made" for name in unknown)
    if not unknown:
        yield from _identities(run.identity, baseline.identity, stems)
    yield from _tables("the scorer's choice of ", run.scoring, baseline.scoring)
    for stem in stems:
        mine, theirs = run.datasets[stem], baseline.datasets[stem]
        if mine.metric != theirs.metric:
            yield _said(f"the metric of {stem}", mine.metric, theirs.metric)
        shared = mine.prompts.keys() & theirs.prompts.keys()
        other = sum(not same_prompt(mine.prompts[row], theirs.prompts[row]) for row in shared)
        if other:
            yield f"the prompts of {other} rows of {stem}"


def speed_mismatches(run: Baseline, baseline: Baseline) -> Iterator[str]:
    """What differs, or is mixed, so that decode speeds say nothing of the method."""
    for what, mine, theirs in (
        ("the device", run.devices, baseline.devices),
        ("the batch size", run.batch_sizes, baseline.batch_sizes),
        ("the dtype", [run.identity.get("dtype")], [baseline.identity.get("dtype")]),
    ):
        if mine != theirs or len(mine) != 1:
            yield _said(what, _listed(mine), _listed(theirs))
    rows = [{stem: set(dataset.scores) for stem, dataset in side.datasets.items()} for side in (run, baseline)]
    if rows[0] != rows[1]:
        yield "the rows that the speed was measured on"


def different(run: Baseline, baseline: Baseline) -> Iterator[str]:
    """What differs and may, beside the method and its options."""
    for key in ("engine", "dtype", "transformers", "tokenizers"):
        mine, theirs = run.identity.get(key), baseline.identity.get(key)
        if mine != theirs:
            yield _said(f"the {key}", mine, theirs)


def _identities(mine: dict[str, Any], theirs: dict[str, Any], stems: list[str]) -> Iterator[str]:
    left_out = {*MAY_DIFFER, *BY_DATASET, *(key for key in _ADDED if key not in mine or key not in theirs)}
    flat = [{key: table[key] for key in table if key not in left_out} for table in (mine, theirs)]
    yield from _tables("the ", *flat)
    for key in BY_DATASET:
        for stem in stems:
            values = [table.get(key, {}).get(stem) for table in (mine, theirs)]
            if None in values or values[0] != values[1]:
                yield _said(f"the {key} of {stem}", *values)


def _tables(what: str, mine: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*mine, *theirs]):
        if key not in mine or key not in theirs or mine[key] != theirs[key]:
            yield _said(f"{what}{key}", mine.get(key), theirs.get(key))


def _said(what: str, mine: Any, theirs: Any) -> str:
    return f"{what} ({_short(mine)}, baseline {_short(theirs)})"


def _short(value: Any) -> str:
    text = "unknown" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:12]}..."


def _listed(values: list[Any]) -> str | None:
    return " and ".join(str(value) for value in values if value is not None) or None
