"""Devices and worker utilization from the sessions in run.json."""

from typing import Any

import pytest

from sparsecache.longbench.run_record import parse_run_record
from sparsecache.longbench.sessions import devices, workers_lines


def _session(*workers: dict[str, Any], seconds: float = 20.0, gpu: str | None = None) -> dict[str, Any]:
    session = {"id": "17-host", "device": "cpu", "gpu": gpu, "clock": {"decode_s": 1.0}}
    return {**session, "workers": list(workers), "seconds": seconds}


def _worker(number: int, rows: int, seconds: float, died: bool = False) -> dict[str, Any]:
    return {"worker": number, "rows": rows, "seconds": seconds, "died": died}


def test_a_shared_cpu_is_a_different_device() -> None:
    two = _session(_worker(1, 3, 9.0), _worker(2, 4, 9.0), _worker(1, 3, 9.0))
    one = {key: value for key, value in two.items() if key not in ("workers", "seconds")}
    assert devices(parse_run_record({"sessions": [one, two]})) == ["cpu of host", "cpu of host shared by 2 workers"]
    assert devices(parse_run_record({"sessions": [_session(_worker(1, 3, 9.0))]})) == ["cpu of host"]
    assert devices(parse_run_record({"sessions": [_session(_worker(1, 3, 9.0), _worker(2, 3, 9.0), gpu="H200")]})) == [
        "H200"
    ]


@pytest.mark.parametrize(
    ("session", "line"),
    [
        (
            _session(_worker(1, 30, 18.0), _worker(2, 30, 20.0)),
            "Workers: 60 rows in 20.0 s by 2, 3 rows/s; busy for 95.0% of that time.",
        ),
        (
            _session(_worker(1, 1, 2.0, died=True), _worker(1, 9, 16.0)),
            "Workers: 10 rows in 20.0 s by 1, 0.5 rows/s; busy for 90.0% of that time; 1 died.",
        ),
        (_session(seconds=0.0), None),
        ({}, None),
    ],
    ids=["two", "a dead one", "none came", "one process"],
)
def test_worker_utilization(session, line) -> None:
    assert list(workers_lines(session)) == ([line] if line else [])
