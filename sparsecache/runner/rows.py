"""Build prediction rows: the source row's fields, the prompt's, and the completion or the error."""

from collections.abc import Callable
from typing import Any

from sparsecache.engine.base import Completion
from sparsecache.errors import one_line
from sparsecache.longbench.jsonl import dumps
from sparsecache.longbench.prompts import Prompt
from sparsecache.longbench.reasoning import opens_reasoning, split_reasoning


def failed_row(row: dict[str, Any], error: Exception) -> dict[str, Any]:
    """Return the error row of a source row whose prompt could not be built."""
    return {**_source_fields(row), "error": error_message(error)}


def finished_row(
    row: dict[str, Any],
    prompt: Prompt,
    completion: Completion,
    decode: Callable[[list[int]], str],
    reasoning: Completion | None = None,
) -> dict[str, Any]:
    """Return the row of a completion; an error row if it failed or cannot be written as JSON.

    Reasoning up to `</think>` is not part of `pred`; the whole text is then in `full_text`.

    decode: turns the completion's token ids into text. reasoning: the first step of a task in two steps; prompt and the
    method's report are then those of the first step, and tokens and seconds are those of both.
    """
    record = {
        **_source_fields(row),
        "prompt_tokens": len(prompt.token_ids),
        "original_tokens": prompt.original_tokens,
        "truncated": prompt.truncated,
        "recut_tokens": prompt.overflow_tokens,
        "prompt_sha256": prompt.sha256,
        "prompt_ids_sha256": prompt.ids_sha256,
        "prompt_end": prompt.end,
    }
    if completion.error is not None:
        return {**record, "error": completion.error}
    steps = [completion] if reasoning is None else [reasoning, completion]
    finished = {
        "new_tokens": sum(len(step.token_ids) for step in steps),
        "finish_reason": completion.finish_reason,
        "prefill_s": round(sum(step.prefill_s for step in steps), 6),
        "decode_s": round(sum(step.decode_s for step in steps), 6),
    }
    if shared_s := sum(step.shared_prefill_s for step in steps):
        finished["shared_prefill_s"] = round(shared_s, 6)
    try:
        text = decode(completion.token_ids)
        split = split_reasoning(text, opens_reasoning(prompt.end))
        complete = {**record, "pred": split.answer, **finished}
        if split.reasoned:
            complete |= {"full_text": text, "unclosed_think": split.unclosed}
        if reasoning is not None:
            complete |= {
                "reasoning": decode(reasoning.token_ids).strip(),
                "reasoning_tokens": len(reasoning.token_ids),
                "reasoning_finish_reason": reasoning.finish_reason,
            }
        report = steps[0].report
        if clash := complete.keys() & report.keys():
            raise ValueError(f"the method reports {', '.join(sorted(clash))}, which are fields of the row.")
        complete |= report
        dumps(complete)
    except Exception as error:  # a text or a report that is no JSON
        return {**record, "error": error_message(error)}
    return complete


def _source_fields(row: dict[str, Any]) -> dict[str, Any]:
    also = [key for key in ("difficulty",) if key in row]
    return {"pred": "", **{key: row[key] for key in ("answers", "all_classes", "length", "_id", *also)}}


def error_message(error: Exception) -> str:
    """Return the `error` of a row."""
    return f"{type(error).__name__}: {one_line(error)}"
