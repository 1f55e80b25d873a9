"""Which errors of a back-end mean that another rank is gone, by what the back-ends really raise."""

from __future__ import annotations

import datetime

import pytest
import torch.distributed as dist

from tapct.distributed.world import lost_rank

LOST = {
    "gloo, killed": "[../third_party/gloo/gloo/transport/tcp/pair.cc:525] Connection closed by "
    "peer [10.0.0.7]:42721",
    "gloo, reset": "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Read error "
    "[10.0.0.7]:17402: Connection reset by peer",
    "gloo, hanging": "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed "
    "out waiting 1800000ms for recv operation to complete",
    "store, gone": "failed to recv, got 0 bytes. Connection was likely closed. Did the remote "
    "server shutdown or crash?",
    "store, waiting": "wait timeout after 300000ms, keys: /here/3",
    "NCCL, killed": "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote "
    "process exited or there was a network error, NCCL version 2.21.5\nncclRemoteError: A call "
    "failed possibly due to a network error or a remote process exiting prematurely.\nLast "
    "error:\nsocketProgress: Connection closed by remote peer node3<48122>",
    "NCCL, hanging": "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, "
    "OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=60000) ran for 60011 milliseconds before "
    "timing out.",
}
OWN_FAULT = {
    "kernel too slow": "CUDA error: the launch timed out and was terminated\nCUDA kernel errors "
    "might be asynchronously reported at some other API call",
    "plug-in": "could not fetch remote object data/labels.csv",
    "memory": "CUDA out of memory. Tried to allocate 2.00 GiB",
    "NCCL, own GPU": "NCCL error in: NCCLUtils.hpp:268, unhandled cuda error (run with "
    "NCCL_DEBUG=INFO for details)\nncclUnhandledCudaError: Call to CUDA function failed.\nLast "
    "error:\nCuda failure 'out of memory'",
    "own code": "request timeout must be positive",
    "own GPU, in a barrier": "CUDA error: unspecified launch failure in a wait timeout kernel",
}


@pytest.mark.parametrize("case", LOST)
def test_what_back_ends_raise_for_a_lost_rank_is_one(case: str) -> None:
    assert lost_rank(RuntimeError(LOST[case]))


@pytest.mark.parametrize("case", OWN_FAULT)
def test_a_fault_of_this_rank_is_no_lost_rank(case: str) -> None:
    assert not lost_rank(RuntimeError(OWN_FAULT[case]))


def test_an_error_of_the_network_is_a_lost_rank_whatever_its_text() -> None:
    assert lost_rank(dist.DistNetworkError("no route to host"))


def test_the_store_of_this_torch_raises_what_is_recognised() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(RuntimeError) as caught:
        store.wait(["here/1"], datetime.timedelta(milliseconds=20))
    assert lost_rank(caught.value)
