"""What a prediction row says: of its source, its prompt, and what became of it."""

from collections.abc import Callable
from typing import Any

from sparsecache.engine.base import Completion
from sparsecache.errors import one_line
from sparsecache.longbench.jsonl import dumps
from sparsecache.longbench.prompts import Prompt


def failed_row(row: dict[str, Any], error: Exception) -> dict[str, Any]:
    """The record of a row that made no prompt."""
    return {**_from_source(row), "error": _described(error)}


def finished_row(
    row: dict[str, Any], prompt: Prompt, completion: Completion, decode: Callable[[list[int]], str]
) -> dict[str, Any]:
    """The record of a completion, its text by `decode`; an error row if it failed or cannot be written down."""
    record = {
        **_from_source(row),
        "prompt_tokens": len(prompt.token_ids),
        "original_tokens": prompt.original_tokens,
        "truncated": prompt.truncated,
        "recut_tokens": prompt.recut_tokens,
        "prompt_sha256": prompt.sha256,
        "prompt_ids_sha256": prompt.ids_sha256,
        "prompt_end": prompt.end,
    }
    if completion.error is not None:
        return {**record, "error": completion.error}
    finished = {
        "new_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "prefill_s": round(completion.prefill_s, 6),
        "decode_s": round(completion.decode_s, 6),
    }
    try:
        whole = {**record, "pred": decode(completion.token_ids), **finished}
        if clash := whole.keys() & completion.report.keys():
            raise ValueError(f"the method reports {', '.join(sorted(clash))}, which the record has already.")
        whole |= completion.report
        dumps(whole)
    except Exception as error:  # a text or a report that cannot be written down
        return {**record, "error": _described(error)}
    return whole


def _from_source(row: dict[str, Any]) -> dict[str, Any]:
    return {"pred": "", **{key: row[key] for key in ("answers", "all_classes", "length", "_id")}}


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
