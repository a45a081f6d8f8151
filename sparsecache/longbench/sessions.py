"""What the sessions in run.json say of the machine that a run's speed was measured on."""

from collections.abc import Iterator
from typing import Any

from sparsecache.longbench.run_record import RunRecord, Session
from sparsecache.longbench.schema import parse


def devices(run: RunRecord) -> list[str]:
    """The devices that decoded rows of a run: names of GPUs, or `cpu of <host>`, since CPUs are not named there."""
    return sorted({_device(session) for session in _decoding(run)})


def batch_sizes(run: RunRecord) -> list[int]:
    """The batch sizes that rows of a run were decoded with."""
    return sorted({session.batch_size or 1 for session in _decoding(run)})


def clock(run: RunRecord) -> dict[str, float] | None:
    """Seconds and tokens of prefill and decode over all sessions, from the engine's clock; None if none decoded."""
    if not run.total("decode_s"):
        return None
    return {
        "prefill_s": run.total("prefill_s"),
        "prefill_tokens": run.total("prefill_tokens"),
        "decode_s": run.total("decode_s"),
        "decode_tokens": run.total("decode_tokens"),
    }


def workers_lines(session: dict[str, Any]) -> Iterator[str]:
    """One line on the workers that a session of run.json had, if any: rows, seconds, and how busy they were."""
    parsed = parse(Session, session)
    workers, seconds = parsed.workers, parsed.seconds
    if workers and seconds:
        rows, busy = sum(worker.rows for worker in workers), sum(worker.seconds for worker in workers)
        count, died = len({worker.worker for worker in workers}), sum(worker.died for worker in workers)
        yield (
            f"Workers: {rows} rows in {seconds:.1f} s by {count}, {rows / seconds:.3g} rows/s; "
            f"busy for {100 * busy / (count * seconds):.1f}% of that time" + (f"; {died} died." if died else ".")
        )


def _decoding(run: RunRecord) -> list[Session]:
    return [session for session in run.sessions if session.clock is not None and session.clock.decode_s]


def _device(session: Session) -> str:
    if session.gpu:
        return session.gpu
    host = str(session.id or "").partition("-")[2] or "an unknown host"
    workers = len({worker.worker for worker in session.workers or ()})
    shared = f" shared by {workers} workers" if workers > 1 else ""
    return f"{session.device or 'a device'} of {host}{shared}"
