"""Host memory for keys and values: checked before it is taken, pinned, and unpinned at the end."""

import gc

import pytest
import torch

from sparsecache.cache import host
from sparsecache.cache.base import Shape
from sparsecache.cache.host import allocate, check_host_memory, copy_into, pinned_bytes
from sparsecache.methods.infinigen import InfiniGen
from sparsecache.methods.vanilla import Vanilla
from tests.methods.stepping import make_cache

CPU = torch.device("cpu")


def test_more_memory_than_the_host_has_is_refused_with_the_numbers(monkeypatch) -> None:
    monkeypatch.setattr(host, "available_nbytes", lambda: 3 * 2**30)
    check_host_memory(3 * 2**30)
    message = r"needs 4.0 GiB of host memory; 3.0 GiB are available"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        check_host_memory(2**32)
    sparse = InfiniGen(offload=True, skew=False, dense_layers=1)  # its dense layer stays on the device
    for method, layers in ((Vanilla(offload=True), 8), (sparse, 9)):
        with pytest.raises(torch.OutOfMemoryError, match=message):
            make_cache(method, Shape(layers, 8, 8, 128), 1, 2**16, 16)


def test_no_limit_is_no_refusal(monkeypatch) -> None:
    monkeypatch.setattr(host, "available_nbytes", lambda: None)
    check_host_memory(2**60)


def test_the_host_reports_its_memory() -> None:
    assert 2**26 < host.available_nbytes() < 2**46


def test_a_containers_limit_counts(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    for most, used, left in (("1000", "400", 600), ("1000", "1400", 0), ("max", "400", host._host_available())):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        assert host.available_nbytes() == pytest.approx(left, rel=0.2)


def test_rows_are_copied_to_the_front_and_the_others_left() -> None:
    target, rows = torch.zeros(2, 5, 3), torch.randn(2, 4, 3)
    copy_into(target, rows)
    assert torch.equal(target[:, :4], rows) and target[:, 4].eq(0).all()


@pytest.mark.parametrize("offload", [False, True])
def test_new_memory_is_zero_and_pins_nothing_without_a_gpu(offload) -> None:
    before = pinned_bytes()
    memory = allocate((2, 3), torch.float16, CPU, offload)
    assert memory.eq(0).all() and memory.dtype == torch.float16 and memory.shape == (2, 3)
    assert pinned_bytes() == before


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, 3 * 2**20 + 5])
def test_pages_belong_to_one_tensor_alone(nbytes) -> None:
    first, second = host.whole_pages(nbytes), host.whole_pages(nbytes)
    for pages in (first, second):  # torch asks whether the start of the storage is pinned
        assert pages.untyped_storage().data_ptr() % host._PAGE == pages.nbytes % host._PAGE == 0
        assert nbytes <= pages.nbytes < nbytes + host._PAGE and not pages.any()
    first.fill_(1)
    del first
    gc.collect()
    assert not second.any() and not host.whole_pages(nbytes).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine")
def test_host_memory_is_pinned_and_unpinned() -> None:
    gpu = torch.device("cuda")
    gc.collect()  # caches of earlier tests
    before = pinned_bytes()
    for _ in range(3):
        memory = allocate((3, 2**20), torch.bfloat16, gpu, offload=True)
        assert memory.is_pinned() and not memory.is_cuda and pinned_bytes() == before + memory.nbytes
        rows = torch.randn(3, 1000, device=gpu, dtype=torch.bfloat16)
        copy_into(memory, rows)
        torch.cuda.synchronize()
        assert torch.equal(memory[:, :1000], rows.cpu())
        del memory
        gc.collect()
        assert pinned_bytes() == before
