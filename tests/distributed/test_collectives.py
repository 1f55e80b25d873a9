"""Collectives of three processes against the same sums computed in one; of a single process,
nothing happens.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import Forked, end_together
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tapct.base.exits import SharedError, UserError
from tapct.distributed import collectives

WORLD = 3
CPU = torch.device("cpu")


def features(rank: int) -> Tensor:
    """(2, 4) of a rank."""
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def loss(all_WND: Tensor, own_ND: Tensor) -> Tensor:
    """A loss of one rank that compares its rows with those of all ranks."""
    return (all_WND.flatten(0, 1) @ own_ND.T).tanh().sum()


def refuse() -> str:
    raise UserError("no such store")


def outcomes(rank: int) -> dict[str, Any]:
    """What one rank computes with every function."""
    own = features(rank).requires_grad_()
    loss(collectives.gather_with_gradient(own), own).backward()
    assert own.grad is not None
    packet = collectives.Packet()
    packet.sum("count", torch.tensor(rank + 2**40))  # float32 would lose the last digits
    packet.mean("loss", torch.tensor([rank, 2.0 * rank], dtype=torch.float64))
    packet.reduce()
    full = torch.arange(10.0).view(5, 2)  # 5 rows over 3 ranks: 2, 2, 1
    mesh = init_device_mesh("cpu", (collectives.world_size(),)) if dist.is_initialized() else None
    sharded = full if mesh is None else distribute_tensor(torch.zeros(5, 2), mesh, [Shard(0)])
    try:
        collectives.from_first(refuse)
        refused = ""
    except UserError as error:
        refused = f"{type(error).__name__}: {error}"
    return {
        "place": [collectives.rank(), collectives.world_size()],
        "sum": collectives.sum_(features(rank)).tolist(),
        "max": collectives.max_(features(rank)).tolist(),
        "gather": collectives.gather(features(rank)).tolist(),
        "gradient": own.grad.tolist(),
        "slots": collectives.sum_(collectives.own_slot(rank + 0.5, CPU)).tolist(),
        "packet": [packet["count"].tolist(), packet["loss"].tolist()],
        "from_first": collectives.from_first(lambda: f"made by rank {rank}"),
        "refused": refused,
        "part": collectives.part_of_full(full, sharded).tolist(),
        "local_shape": list(collectives.local_part(sharded).shape),
    }


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    Path(folder, f"{rank}.json").write_text(json.dumps(outcomes(rank)))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("collectives")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    ranks = [
        Forked([__file__, str(rank), str(folder)], env={**os.environ, "PYTHONPATH": path})
        for rank in range(WORLD)
    ]
    assert end_together(ranks, timeout=120, grace_s=5) == [0] * WORLD, [
        one.output() for one in ranks
    ]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.dist
def test_reductions_are_those_of_the_stacked_tensors(of_ranks: list[dict[str, Any]]) -> None:
    stacked = torch.stack([features(rank) for rank in range(WORLD)])
    for rank, row in enumerate(of_ranks):
        assert row["place"] == [rank, WORLD]
        torch.testing.assert_close(torch.tensor(row["sum"], dtype=torch.float64), stacked.sum(0))
        assert row["max"] == stacked.amax(0).tolist() and row["gather"] == stacked.tolist()
        assert row["sum"] == of_ranks[0]["sum"], "every rank receives the same bits"
        assert row["slots"] == [0.5, 1.5, 2.5]


@pytest.mark.dist
def test_the_gradient_through_a_gather_is_that_of_the_sum_of_all_losses(
    of_ranks: list[dict[str, Any]],
) -> None:
    leaves = [features(rank).requires_grad_() for rank in range(WORLD)]
    all_WND = torch.stack(leaves)
    torch.stack([loss(all_WND, leaf) for leaf in leaves]).sum().backward()
    for leaf, row in zip(leaves, of_ranks, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(torch.tensor(row["gradient"], dtype=torch.float64), leaf.grad)


@pytest.mark.dist
def test_a_packet_keeps_counts_and_averages(of_ranks: list[dict[str, Any]]) -> None:
    for row in of_ranks:
        assert row["packet"] == [3 * 2**40 + 3, [1.0, 2.0]]


@pytest.mark.dist
def test_the_first_rank_decides_for_all(of_ranks: list[dict[str, Any]]) -> None:
    for row in of_ranks:
        assert row["from_first"] == "made by rank 0"
        assert row["refused"] == "SharedError: no such store"


@pytest.mark.dist
def test_a_full_tensor_is_cut_as_torch_shards_it(of_ranks: list[dict[str, Any]]) -> None:
    full = torch.arange(10.0).view(5, 2)
    assert torch.cat([torch.tensor(row["part"]) for row in of_ranks]).equal(full)
    assert [row["local_shape"] for row in of_ranks] == [[2, 2], [2, 2], [1, 2]]
    assert [len(row["part"]) for row in of_ranks] == [2, 2, 1]


def test_a_single_process_gets_back_what_it_gave() -> None:
    row = outcomes(0)
    own, full = features(0), torch.arange(10.0).view(5, 2)
    assert row["place"] == [0, 1] and row["sum"] == row["max"] == own.tolist()
    assert row["gather"] == [own.tolist()] and row["slots"] == [0.5]
    assert row["packet"] == [2**40, [0.0, 0.0]] and row["part"] == full.tolist()
    assert row["refused"] == "UserError: no such store"
    packet = collectives.Packet()
    packet.sum("a", own)
    with pytest.raises(AssertionError, match="already"):
        packet.sum("a", own)
    assert issubclass(SharedError, UserError)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
