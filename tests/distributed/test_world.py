"""How ranks meet, how many of them share a copy, and what the error of a lost rank shows."""

from __future__ import annotations

import socket

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from tapct.base.exits import UserError
from tapct.base.ranks import Ranks
from tapct.distributed import world as worlds
from tapct.distributed.config import Config
from tapct.distributed.world import cause_of, join_ranks, shard_size


def test_a_single_process_has_no_mesh_and_one_copy() -> None:
    with join_ranks(Ranks(), torch.device("cpu"), Config()) as alone:
        assert alone.mesh is alone.side is alone.store is None and alone.num_copies == 1
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("wanted", "per_node", "size"),
    [(1, "4", 1), (2, "4", 2), (8, "4", 8), (0, "4", 4), (0, "", 8)],
)
def test_a_copy_is_sharded_over_the_ranks_of_a_node_by_default(
    monkeypatch: pytest.MonkeyPatch, wanted: int, per_node: str, size: int
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", per_node)
    assert shard_size(Ranks(0, 8), wanted) == size


def test_a_shard_size_that_does_not_divide_the_ranks_is_refused() -> None:
    with pytest.raises(UserError, match=r"parallel.shard 3 does not divide the 8 ranks"):
        shard_size(Ranks(0, 8), 3)


@pytest.mark.parametrize(
    ("shard", "axes", "copies"), [(4, ("shard",), 1), (2, ("replicate", "shard"), 2)]
)
def test_the_ranks_of_one_node_form_a_mesh_of_one_axis(
    shard: int, axes: tuple[str, ...], copies: int
) -> None:
    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        mesh = worlds.mesh_of("cpu", 4, shard)
        assert mesh.mesh_dim_names == axes
        world = worlds.World(Ranks(0, 4), torch.device("cpu"), mesh)
        assert world.num_copies == copies and mesh["shard"].size() == shard
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        (
            "[../third_party/gloo/pair.cc:525] Connection closed by peer [::1]:9. This may mean x",
            "Connection closed by peer [::1]:9",
        ),
        (
            "NCCL error in: a.cpp:1\nLast error:\nsocket is closed by node2",
            "socket is closed by node2",
        ),
        ("one line", "one line"),
    ],
)
def test_the_cause_of_a_lost_rank_is_one_line(message: str, cause: str) -> None:
    assert cause_of(RuntimeError(message)) == cause


def test_ranks_that_do_not_meet_are_one_line_with_address_and_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(worlds, "MEET_S", 1.0)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with (
        pytest.raises(UserError, match=rf"^rank 0 of 2 .* at 127.0.0.1:{port} within 2 s: \S"),
        join_ranks(Ranks(0, 2), torch.device("cpu"), Config(timeout_s=2.0)),
    ):
        pass
    assert not torch.distributed.is_initialized()


def test_without_a_launcher_the_error_names_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(UserError, match=r"rank 1 of 2 could not meet the others: .*torchrun"),
        join_ranks(Ranks(1, 2), torch.device("cpu"), Config()),
    ):
        pass
