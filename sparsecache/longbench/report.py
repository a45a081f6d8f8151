"""Scores and run health as tables on the terminal and as JSON files."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sparsecache.longbench.records import write_atomically
from sparsecache.longbench.scores import BUCKETS, Average, DatasetScore, Options, RunScore, Summary
from sparsecache.longbench.tasks import Task
from sparsecache.longbench.text import degenerate

_AVERAGE_NAMES = {
    "avg_en": "Avg, English",
    "avg_zh": "Avg, Chinese",
    "avg_all": "Avg, all",
    "flat_mean": "mean of datasets",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain text table: first column to the left, the others to the right; an empty row is a rule."""
    lines = [list(head), [], *map(list, rows)]
    widths = [max(len(line[column]) for line in lines if line) for column in range(len(head))]
    rule = "  ".join("-" * width for width in widths)
    text = (
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() if line else rule
        for line in lines
    )
    return "\n".join(text)


def score_table(result: RunScore) -> str:
    """The scores of one run, with what qualifies them below the table."""
    rows = [_dataset_line(dataset, result.e) for dataset in result.datasets]
    rows += [[], *(_average_line(name, mean) for name, mean in result.categories.items() if mean.datasets)]
    rows += [
        [],
        *(_average_line(_AVERAGE_NAMES[name], mean) for name, mean in result.averages.items() if mean.datasets),
    ]
    head = ["dataset", "score", "±", "n", "of"]
    if result.e:
        head += [text for name in BUCKETS for text in (name, "n")]
        rows = [row + [""] * (len(head) - len(row)) if row else row for row in rows]
    note = result.run.get("model", {}).get("note")
    lines = [str(result.folder), *([f"Note: {note}"] if note else []), table(head, rows), *_remarks(result)]
    return "\n".join(lines)


def result_json(result: RunScore) -> dict[str, Any]:
    """Scores in the official shape: dataset to score, or to bucket to score; null where there are no rows."""
    if result.e:
        return {
            dataset.task.name: {name: summary.score for name, summary in dataset.buckets.items()}
            for dataset in result.datasets
        }
    return {dataset.task.name: dataset.summary.score for dataset in result.datasets}


def summary_json(result: RunScore, options: Options) -> dict[str, Any]:
    """Everything known of the scores, with n beside each number."""
    return {
        "folder": result.folder.name,
        "longbench_e": result.e,
        "complete": result.complete,
        "backends": {
            "rouge_l": "rouge 1.0.1",
            "edit_similarity": options.edit_backend,
            "official_recursion": options.official_recursion,
        },
        "datasets": {dataset.task.name: _dataset_json(dataset) for dataset in result.datasets},
        "categories": {name: _average_json(mean) for name, mean in result.categories.items()},
        "averages": {name: _average_json(mean) for name, mean in result.averages.items()},
        "decode": decode_speed(result.run),
    }


def write_results(result: RunScore, options: Options) -> list[Path]:
    """Writes result.json and summary.json (`_e` in the name for LongBench-E) beside the predictions."""
    ending = "_e.json" if result.e else ".json"
    contents = {"result": result_json(result), "summary": summary_json(result, options)}
    paths = []
    for name, content in contents.items():
        paths.append(result.folder / f"{name}{ending}")
        write_atomically(paths[-1], json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    return paths


def decode_speed(run: dict[str, Any]) -> dict[str, Any] | None:
    """Decode tokens per second and peak GPU bytes over all sessions of a run, from the engine's clock."""
    clocks = [session["clock"] for session in run.get("sessions", []) if session.get("clock")]
    seconds = sum(clock["decode_s"] for clock in clocks)
    if not seconds:
        return None
    tokens = sum(clock["decode_tokens"] for clock in clocks)
    prefilled, prefill_seconds = (sum(clock[key] for clock in clocks) for key in ("prefill_tokens", "prefill_s"))
    peaks = [clock["peak_gpu_bytes"] for clock in clocks if clock["peak_gpu_bytes"] is not None]
    return {
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds, 1),
        "prefill_tokens_per_s": round(prefilled / prefill_seconds, 1) if prefill_seconds else None,
        "peak_gpu_bytes": max(peaks) if peaks else None,
    }


def speed_lines(run: dict[str, Any]) -> Iterable[str]:
    """One line on the speed and peak memory of a run, if anything was decoded."""
    speed = decode_speed(run)
    if speed:
        peak = speed["peak_gpu_bytes"]
        memory = f"; peak GPU memory {peak / 2**30:.1f} GiB" if peak else ""
        yield (
            f"Speed: decode {speed['tokens_per_s']} tokens/s over {speed['tokens']} tokens, prefill "
            f"{speed['prefill_tokens_per_s'] or '-'} tokens/s{memory}."
        )


def health_table(predictions: Iterable[tuple[Task, str, int, list[dict[str, Any]]]]) -> str:
    """What a finished run must be watched for, from (task, file stem, expected rows, rows) of each dataset."""
    lines = []
    many: dict[str, list[str]] = {}
    for task, stem, expected, rows in predictions:
        counts = _health(rows)
        lines.append([stem, f"{len(rows)}/{expected}", *(str(count) for count in counts.values())])
        for remark in _HEALTH_WARNINGS:
            if _too_many(remark, counts, len(rows), task):
                many.setdefault(remark, []).append(f"{stem} {counts[remark]}/{len(rows)}")
    head = ["dataset", "rows", "errors", "truncated", "recut", "ended by length", "empty", "degenerate"]
    warnings = [f"Warning: {_HEALTH_WARNINGS[remark]}: {', '.join(where)}." for remark, where in many.items()]
    return "\n".join([table(head, lines), *warnings])


_HEALTH_WARNINGS = {
    "errors": "rows failed, and the same command (without --overwrite) retries them",
    "recut": "prompts lost more than 16 tokens after wrapping (max_length does not fit the window)",
    "length": "short answers ended by length (is the chat template or a stop id missing?)",
    "empty": "predictions are empty",
    "degenerate": "predictions are mostly one repeated piece, symbols or digits",
}


def _too_many(remark: str, counts: dict[str, int], rows: int, task: Task) -> bool:
    if remark == "length":
        return task.short_answer and counts[remark] > rows / 2
    return counts[remark] > (0 if remark in ("errors", "recut") else rows / 10)


def _health(rows: list[dict[str, Any]]) -> dict[str, int]:
    finished = [row for row in rows if "error" not in row]
    return {
        "errors": len(rows) - len(finished),
        "truncated": sum(row.get("truncated") is True for row in finished),
        "recut": sum(isinstance(cut := row.get("recut_tokens"), int) and cut > 16 for row in finished),
        "length": sum(row.get("finish_reason") == "length" for row in finished),
        "empty": sum(not str(row.get("pred", "")).strip() for row in finished),
        "degenerate": sum(degenerate(str(row.get("pred", ""))) for row in finished),
    }


def _dataset_line(dataset: DatasetScore, e: bool) -> list[str]:
    line = [dataset.task.file_stem(e), *_summary_cells(dataset.summary), str(_asked(dataset))]
    if e:
        line += [cell for part in dataset.buckets.values() for cell in (_number(part.score, 2), str(part.n))]
    return line


def _summary_cells(summary: Summary) -> list[str]:
    return [_number(summary.score, 2), _number(summary.stderr, 1), str(summary.n)]


def _average_line(name: str, mean: Average) -> list[str]:
    note = f" ({mean.datasets} of {mean.of} datasets)" if mean.partial else ""
    return [name + note, _number(mean.score, 2), _number(mean.stderr, 1), str(mean.n), ""]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _asked(dataset: DatasetScore) -> int:
    """Rows asked for: all there are, where nobody says."""
    return len(dataset.rows) if dataset.expected is None else dataset.expected


def _remarks(result: RunScore) -> Iterable[str]:
    stems = {id(dataset): dataset.task.file_stem(result.e) for dataset in result.datasets}
    partial = [
        f"{stems[id(dataset)]} {dataset.finished} of {_asked(dataset)} rows"
        for dataset in result.datasets
        if not dataset.complete and dataset.finished < _asked(dataset)
    ]
    if partial:
        yield f"INCOMPLETE: {', '.join(partial)}."
    said_of: dict[str, list[str]] = {}
    for dataset in result.datasets:
        for warning in dataset.warnings:
            said_of.setdefault(warning, []).append(stems[id(dataset)])
    for warning, names in said_of.items():
        whom = "every dataset" if len(names) == len(result.datasets) else ", ".join(names)
        yield f"Warning: {whom}: {warning}."
    for dataset in result.datasets:
        if dataset.rouge_score:
            values = ", ".join(f"{name} {value:.2f}" for name, value in dataset.rouge_score.items())
            yield f"rouge-score: {stems[id(dataset)]}: {values}"
    yield from speed_lines(result.run)


def _dataset_json(dataset: DatasetScore) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "score": dataset.summary.score,
        "stderr": _rounded(dataset.summary.stderr),
        "n": len(dataset.rows),
        "expected_n": dataset.expected,
        "complete": dataset.complete,
        "metric": dataset.task.metric,
        "empty": dataset.count("empty"),
        "metric_errors": dataset.count("metric_error"),
        "error_rows": dataset.count("error_row"),
        "beyond_official_recursion": dataset.count("too_deep"),
        "warnings": dataset.warnings,
    }
    if dataset.rouge_score is not None:
        fields["rouge_score"] = dataset.rouge_score
    if dataset.e:
        fields["buckets"] = {
            name: {"score": part.score, "stderr": _rounded(part.stderr), "n": part.n}
            for name, part in dataset.buckets.items()
        }
    return fields


def _average_json(mean: Average) -> dict[str, Any]:
    return {
        "score": _rounded(mean.score),
        "stderr": _rounded(mean.stderr),
        "datasets": mean.datasets,
        "of_datasets": mean.of,
        "n": mean.n,
        "partial": mean.partial,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
