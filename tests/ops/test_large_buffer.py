"""The buffer pool of the CPU kernels: pages are reused, never by two tensors, and never beyond the peak usage."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from delib_fast.ops._library import WHY_NO_COMPILED

pytestmark = [
    pytest.mark.skipif(WHY_NO_COMPILED is not None, reason=WHY_NO_COMPILED or ""),
    pytest.mark.skipif(sys.platform != "linux", reason="madvise exists only on Linux"),
]
MIB = 1 << 20


def large(mib: int, value: float = 1.0) -> torch.Tensor:
    """A buffer of this size from the pool: the result of scale_gradient."""
    return torch.ops.delib_fast.scale_gradient(torch.full((mib * MIB // 4,), value), torch.ones(()), torch.float32)


@pytest.fixture(autouse=True)
def empty_pool():
    torch.ops.delib_fast.release_buffers()


def test_pages_are_reused_after_the_last_tensor_on_them_is_freed():
    first = large(32)
    address, view = first.data_ptr(), first[7:9]
    del first
    assert large(32).data_ptr() != address  # a view still uses it
    assert view.tolist() == [1.0, 1.0]
    del view
    addresses = {large(32).data_ptr() for _ in range(3)}
    assert len(addresses) == 1


def test_no_more_is_kept_than_was_in_use_at_one_time():
    for mib in (16, 40, 24, 64, 32):  # only one in use at a time
        large(mib)
    assert torch.ops.delib_fast.release_buffers() == 64 * MIB
    assert torch.ops.delib_fast.release_buffers() == 0


def test_repeated_steps_with_three_sizes_reuse_their_pages():
    held, addresses = None, set()
    for _ in range(4):
        weight = large(48)
        held = None
        scratch = large(10)
        addresses.add((weight.data_ptr(), scratch.data_ptr()))
        del scratch
        held = large(24)
        del weight
    assert held is not None
    assert len(addresses) <= 2


def test_threads_never_share_a_buffer():
    wrong = []

    def work(value: float) -> None:
        for mib in (16, 24, 16, 40):
            mine = large(mib, value)
            if not torch.equal(mine, torch.full_like(mine, value)):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
