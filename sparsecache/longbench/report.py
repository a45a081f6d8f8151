"""Writes scores as JSON, and formats the speed of a run and the health of its predictions."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsecache.files import write_atomically
from sparsecache.longbench.jsonl import write_json
from sparsecache.longbench.kept import aggregate_kept, format_kept, format_percent
from sparsecache.longbench.run_record import RunRecord
from sparsecache.longbench.score_types import STRATA, Average, DatasetScore, RunScore
from sparsecache.longbench.scores import ScoringOptions
from sparsecache.longbench.tables import text_table
from sparsecache.longbench.tasks import Task
from sparsecache.longbench.text import is_degenerate

MIN_SECONDS = 1e-6  # shorter times give no speed


def result_json(result: RunScore) -> dict[str, Any]:
    """Return scores in the official format: dataset -> score, or -> bucket -> score.

    None without rows.
    """
    if result.e:
        return {
            dataset.task.name: {name: summary.score for name, summary in dataset.buckets.items()}
            for dataset in result.datasets
        }
    return {dataset.task.name: dataset.summary.score for dataset in result.datasets}


def _write_v2_result(result: RunScore) -> list[Path]:
    """Write result.txt, the table of LongBench v2's own code, if the run has its rows."""
    names = {"longbench_v2": result.folder.name, "longbench_v2_cot": f"{result.folder.name}_cot"}
    lines = [[names[dataset.task.name], *v2_result(dataset)] for dataset in result.datasets if dataset.strata]
    if not lines:
        return []
    header = "\t".join(("Model", "Overall", *(name.capitalize() for name in STRATA)))
    path = result.folder / "result.txt"
    write_atomically(path, "\n".join([header, *("\t".join(line) for line in lines)]))
    return [path]


def v2_result(dataset: DatasetScore) -> list[str]:
    """Return the accuracy in percent overall and by stratum, rounded as LongBench v2's own code does; - for no rows."""
    parts = [dataset, *(dataset.strata.get(name) for name in STRATA)]
    counts = [(sum(row.score for row in part.rows), len(part.rows)) if part else (0, 0) for part in parts]
    return [str(round(100 * int(right) / rows, 1)) if rows else "-" for right, rows in counts]


def summary_json(result: RunScore, options: ScoringOptions) -> dict[str, Any]:
    """Return scores with standard errors, row counts, warnings, averages and speed."""
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


def write_results(result: RunScore, options: ScoringOptions) -> list[Path]:
    """Write result.json and summary.json (result_e.json, summary_e.json for LongBench-E).

    Returns their paths.
    """
    ending = "_e.json" if result.e else ".json"
    contents = {"result": result_json(result), "summary": summary_json(result, options)}
    paths = []
    for name, content in contents.items():
        paths.append(result.folder / f"{name}{ending}")
        write_json(paths[-1], content)
    paths += _write_v2_result(result)
    return paths


def decode_speed(run: RunRecord) -> dict[str, Any] | None:
    """Return speed (tokens/s) and peak GPU bytes over all sessions, as the engine measured them."""
    seconds = run.total("decode_s")
    if seconds < MIN_SECONDS:
        return None
    tokens = run.total("decode_tokens")
    prefilled, prefill_seconds = run.total("prefill_tokens"), run.total("prefill_s")
    peaks = [clock.peak_gpu_bytes for clock in run.clocks if clock.peak_gpu_bytes is not None]
    return {
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds, 1),
        "prefill_tokens_per_s": round(prefilled / prefill_seconds, 1) if prefill_seconds >= MIN_SECONDS else None,
        "peak_gpu_bytes": max(peaks) if peaks else None,
    }


def speed_lines(run: RunRecord) -> Iterable[str]:
    """Yield one line with the speed and peak memory of a run, if anything was decoded."""
    speed = decode_speed(run)
    if speed:
        peak = speed["peak_gpu_bytes"]
        memory = f"; peak GPU memory {peak / 2**30:.1f} GiB" if peak else ""
        yield (
            f"Speed: decode {speed['tokens_per_s']} tokens/s over {speed['tokens']} tokens, prefill "
            f"{speed['prefill_tokens_per_s'] or '-'} tokens/s{memory}."
        )


def health_table(predictions: Iterable[tuple[Task, str, int, list[dict[str, Any]]]]) -> str:
    """Return a table of signs of trouble in predictions, with warnings.

    `predictions`: (task, file stem, number of expected rows, rows) per dataset.
    """
    predictions = list(predictions)
    kept = [aggregate_kept(rows) for *_, rows in predictions]
    sparse = any(part and part.rows for part in kept)
    table = []
    warned: dict[str, list[str]] = {}
    for (task, stem, expected, rows), part in zip(predictions, kept, strict=True):
        counts = _health(rows)
        cells = [stem, f"{len(rows)}/{expected}", *(str(count) for count in counts.values())]
        table.append([*cells, format_percent(part.share if part else None)] if sparse else cells)
        for sign in _HEALTH_WARNINGS:
            if _too_many(sign, counts, len(rows), task):
                warned.setdefault(sign, []).append(f"{stem} {counts[sign]}/{len(rows)}")
    header = ["dataset", "rows", "errors", "truncated", "recut", "ended by length", "empty", "degenerate"]
    header += ["kept"] if sparse else []
    warnings = [f"Warning: {_HEALTH_WARNINGS[sign]}: {', '.join(where)}." for sign, where in warned.items()]
    return "\n".join([text_table(header, table), *warnings, *format_kept(kept)])


_HEALTH_WARNINGS = {
    "errors": "rows failed; rerun the command (without --overwrite) to retry them",
    "recut": "prompts lost more than 16 tokens after wrapping (max_length does not fit the window)",
    "length": "short answers ended by length (is the chat template or a stop id missing?)",
    "empty": "predictions are empty",
    "degenerate": "predictions are mostly repetitions, symbols or digits",
}


def _too_many(sign: str, counts: dict[str, int], rows: int, task: Task) -> bool:
    if sign == "length":
        return task.short_answer and counts[sign] > rows / 2
    return counts[sign] > (0 if sign in ("errors", "recut") else rows / 10)


def _health(rows: list[dict[str, Any]]) -> dict[str, int]:
    finished = [row for row in rows if "error" not in row]
    return {
        "errors": len(rows) - len(finished),
        "truncated": sum(row.get("truncated") is True for row in finished),
        "recut": sum(isinstance(cut := row.get("recut_tokens"), int) and cut > 16 for row in finished),
        "length": sum(_ended_by_length(row) for row in finished),
        "empty": sum(not str(row.get("pred", "")).strip() and not row.get("unclosed_think") for row in finished),
        "degenerate": sum(is_degenerate(str(row.get("pred", ""))) for row in finished),
    }


def _ended_by_length(row: dict[str, Any]) -> bool:
    return row.get("finish_reason") == "length" or row.get("unclosed_think") is True


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
        "beyond_official_recursion": dataset.count("recursion_exceeded"),
        "warnings": dataset.warnings,
    }
    if dataset.num_ended_by_length is not None:
        fields["ended_by_length"] = dataset.num_ended_by_length
    if dataset.kept is not None:
        fields |= dataset.kept.as_json()
    if dataset.strata:
        fields["no_letter"] = dataset.count("no_letter")
        fields["strata"] = {
            name: {"score": part.summary.score, "stderr": _rounded(part.summary.stderr), "n": part.summary.n}
            for name, part in dataset.strata.items()
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
    fields = {
        "score": _rounded(mean.score),
        "stderr": _rounded(mean.stderr),
        "datasets": mean.datasets,
        "of_datasets": mean.of_datasets,
        "n": mean.n,
        "partial": mean.partial,
    }
    return fields if mean.kept is None else {**fields, "kept": round(mean.kept, 6)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
