"""The pager compared with a model of it: contents, LRU moves, the budget; and a failing disk."""

import gc
import os
import resource
import threading
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reparam.optim.pager import Pager
from reparam.optim.store import make_store

CPU = torch.device("cpu")
GPU = pytest.param(
    torch.device("cuda"), marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
)
DEVICES = pytest.mark.parametrize("device", [CPU, GPU])
SIZE = 16


def lru(accesses: list[int], slots: int) -> tuple[int, int]:
    """The numbers of pages read and written by an LRU cache that starts empty."""
    held: list[int] = []
    seen: set[int] = set()
    read = written = 0
    for index in accesses:
        if index in held:
            held.remove(index)
        else:
            read += index in seen
            if len(held) == slots:
                held.pop(0)
                written += 1
        seen.add(index)
        held.append(index)
    return read, written


@DEVICES
@given(accesses=st.lists(st.integers(0, 6), max_size=40), slots=st.integers(1, 8), ahead=st.booleans())
def test_contents_and_counters_are_those_of_an_lru_cache(
    device: torch.device, accesses: list[int], slots: int, ahead: bool
) -> None:
    pager = Pager(SIZE, slots=slots, device=device)
    pager.grow(7)
    expected = [0] * 7
    for at, index in enumerate(accesses):
        page = pager.page(index)
        if ahead and at + 1 < len(accesses):
            pager.prefetch(accesses[at + 1])  # moves nothing that an access would not
        assert page.tolist() == [expected[index]] * SIZE
        page += 1
        expected[index] += 1
    assert [pager.peek(index).tolist() for index in range(7)] == [[count] * SIZE for count in expected]
    read, written = lru(accesses, slots)
    found = pager.paging
    assert found.faults + found.prefetched == read
    assert found.evictions == written
    assert (found.bytes_in, found.bytes_out) == (read * SIZE, written * SIZE)
    assert found.peak_resident == min(slots, len(set(accesses))) * SIZE
    assert found.total == 7 * SIZE


def test_a_page_that_is_fetched_ahead_is_no_fault() -> None:
    pager = Pager(SIZE, slots=2, device=CPU)
    pager.grow(3)
    for index in (0, 1, 2):
        pager.page(index)
    pager.prefetch(0)
    assert (pager.paging.faults, pager.paging.prefetched) == (0, 1)
    pager.page(0)
    pager.page(1)
    assert (pager.paging.faults, pager.paging.prefetched) == (1, 1)


def test_room_for_one_page_leaves_none_to_fetch_ahead() -> None:
    pager = Pager(SIZE, slots=1, device=CPU)
    pager.grow(2)
    pager.page(0)
    page = pager.page(1).fill_(3)
    pager.prefetch(0)
    assert page.tolist() == [3] * SIZE
    assert pager.paging.prefetched == 0


def test_everything_fits_and_no_file_is_made(tmp_path: Path) -> None:
    for slots in (None, 3):
        pager = Pager(SIZE, slots=slots, device=CPU, folder=tmp_path / "missing")
        pager.grow(3)
        for index in (0, 1, 2, 0):
            pager.page(index)
        assert pager.paging.evictions == 0


def held(folder: Path) -> list[str]:
    """Files in a folder that this process has open, including unlinked ones."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.lexists(link) and str(folder) in os.readlink(link)]


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    others = set(threading.enumerate())
    pager = Pager(SIZE, slots=1, device=CPU, folder=tmp_path)
    pager.grow(2)
    pager.page(0)
    pager.page(1)
    assert list(tmp_path.iterdir()) == []  # the file has no name: not even a killed process leaves it
    assert len(held(tmp_path)) == 1
    workers = [thread for thread in set(threading.enumerate()) - others if thread.name.startswith("reparam-pages")]
    assert len(workers) == 1
    gone = weakref.ref(pager)
    del pager
    gc.collect()
    workers[0].join(5)
    assert gone() is None
    assert held(tmp_path) == []
    assert not workers[0].is_alive()


@pytest.fixture
def limit():
    """Limit the size of files that this process may write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_is_an_error_before_anything_moves(tmp_path: Path, limit) -> None:
    pager = Pager(4096, slots=1, device=CPU, folder=tmp_path)
    limit(4096)
    with pytest.raises(OSError, match=rf"cannot reserve 8,192 bytes for the file .* in {tmp_path} \(File too large\)"):
        pager.grow(2)


def test_a_write_that_fails_is_an_error_then_and_ever_after(tmp_path: Path, limit) -> None:
    pager = Pager(4096, slots=1, device=CPU, folder=tmp_path)
    pager.grow(3)
    pager.page(2)
    pager.page(1)
    limit(4096)
    with pytest.raises(OSError, match=r"cannot write or read the file .*free some space.*resume from a checkpoint"):
        pager.page(0)
    limit(2**30)
    for index in (1, 2):
        with pytest.raises(OSError, match="cannot write or read"):
            pager.peek(index)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    pager = Pager(SIZE, slots=1, device=CPU, folder=tmp_path / "missing")
    with pytest.raises(OSError, match=r"cannot create the file of the optimizer's pages in .*missing"):
        pager.grow(2)


def test_a_device_without_a_store() -> None:
    with pytest.raises(ValueError, match="pages on meta cannot be moved: leave budget out"):
        make_store(SIZE, torch.device("meta"), None)
