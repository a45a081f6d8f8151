"""What the sessions in run.json say of the machine that a run's speed was measured on."""

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


def _decoding(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [session for session in run.get("sessions", []) if (session.get("clock") or {}).get("decode_s")]


def _device(session: dict[str, Any]) -> str:
    host = str(session.get("id", "")).partition("-")[2] or "an unknown host"
    workers = len({worker.get("worker") for worker in session.get("workers", ())})
    shared = f" shared by {workers} workers" if workers > 1 else ""
    return str(session.get("gpu") or f"{session.get('device') or 'a device'} of {host}{shared}")
