"""What the sessions in run.json say of the machine that a run's speed was measured on."""

from collections.abc import Iterator
from typing import Any

from sparsecache.longbench.jsonl import figure


def devices(run: dict[str, Any]) -> list[str]:
    """The devices that decoded rows of a run: names of GPUs, or `cpu of <host>`, since CPUs are not named there."""
    return sorted({_device(session) for session in _decoding(run)})


def batch_sizes(run: dict[str, Any]) -> list[int]:
    """The batch sizes that rows of a run were decoded with."""
    return sorted({int(session.get("batch_size") or 1) for session in _decoding(run)})


def clock(run: dict[str, Any]) -> dict[str, float] | None:
    """Seconds and tokens of prefill and decode over all sessions, from the engine's clock; None if none decoded."""
    clocks = [session["clock"] for session in _decoding(run)]
    keys = ("prefill_s", "prefill_tokens", "decode_s", "decode_tokens")
    return {key: sum(figure(one, key) or 0.0 for one in clocks) for key in keys} if clocks else None


def workers_lines(session: dict[str, Any]) -> Iterator[str]:
    """One line on the workers that a session had, if it had any: rows, seconds, and how busy they were."""
    workers, seconds = session.get("workers"), session.get("seconds")
    if workers and seconds:
        rows, busy = (sum(worker[key] for worker in workers) for key in ("rows", "seconds"))
        count, died = len({worker["worker"] for worker in workers}), sum(worker["died"] for worker in workers)
        yield (
            f"Workers: {rows} rows in {seconds:.1f} s by {count}, {rows / seconds:.3g} rows/s; "
            f"busy for {100 * busy / (count * seconds):.1f}% of that time" + (f"; {died} died." if died else ".")
        )


def _decoding(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [session for session in run.get("sessions", []) if (session.get("clock") or {}).get("decode_s")]


def _device(session: dict[str, Any]) -> str:
    host = str(session.get("id", "")).partition("-")[2] or "an unknown host"
    workers = len({worker.get("worker") for worker in session.get("workers", ())})
    shared = f" shared by {workers} workers" if workers > 1 else ""
    return str(session.get("gpu") or f"{session.get('device') or 'a device'} of {host}{shared}")
