"""Memory in the host: as much as asked for, refused with the numbers where there is not enough, unpinned at the end."""

import gc

import pytest
import torch

from sparsecache.cache.base import Shape
from sparsecache.cache.host import make_room, put
from sparsecache.methods import _host
from sparsecache.methods.infinigen import InfiniGen
from sparsecache.methods.vanilla import Vanilla

CPU = torch.device("cpu")


def test_what_the_host_has_not_is_refused_with_the_numbers(monkeypatch) -> None:
    monkeypatch.setattr(_host, "_available", lambda: 3 * 2**30)
    make_room(2**20, dtype=torch.float32, device=CPU, offload=True)
    with pytest.raises(torch.OutOfMemoryError, match=r"needs 4.0 GiB of host memory, and 3.0 GiB are available"):
        make_room(2**30, dtype=torch.float32, device=CPU, offload=True)
    sparse = InfiniGen(offload=True, skew=False, dense_layers=1)
    for method, layers in ((Vanilla(offload=True), 8), (sparse, 9)):  # keys and values together
        with pytest.raises(torch.OutOfMemoryError, match=r"needs 4.0 GiB of host memory, and 3.0 GiB are available"):
            method.allocate(Shape(layers, 8, 8, 128), 1, 2**16, CPU, torch.float32)


def test_the_host_says_what_it_has() -> None:
    assert 2**26 < _host._available() < 2**46


def test_rows_are_put_first_and_the_others_left() -> None:
    target, rows = torch.zeros(2, 5, 3), torch.randn(2, 4, 3)
    put(rows, target)
    assert torch.equal(target[:, :4], rows) and target[:, 4].eq(0).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine")
def test_host_memory_is_pinned_and_let_go() -> None:
    gpu = torch.device("cuda")
    for _ in range(3):
        room = make_room(3, 2**20, dtype=torch.bfloat16, device=gpu, offload=True)
        assert room.is_pinned() and not room.is_cuda and room.nbytes == 3 * 2**21
        rows = torch.randn(3, 1000, device=gpu, dtype=torch.bfloat16)
        put(rows, room)
        torch.cuda.synchronize()
        assert torch.equal(room[:, :1000], rows.cpu())
        del room
        gc.collect()


def test_a_containers_limit_counts(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(_host, "_CGROUP", tmp_path)
    for most, used, left in (("1000", "400", 600), ("1000", "1400", 0), ("max", "400", _host._of_host())):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        assert _host._available() == pytest.approx(left, rel=0.2)
