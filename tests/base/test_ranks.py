"""Where the ranks of a run meet, how many share a node, and what a child of one must not
receive.
"""

from __future__ import annotations

import pytest

from tapct.base import ranks
from tapct.base.ranks import Ranks


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[08-11,20],big1", "gpu08"),
        ("node0", "node0"),
        ("a1,a2", "a1"),
        ("n[3,5]-ib,x", "n3-ib"),
        ("a1,n[3-5]", "a1"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_slurm_node_list(nodes: str, host: str) -> None:
    assert ranks.first_host(nodes) == host


def test_ranks_meet_at_the_launchers_address_or_on_the_first_node() -> None:
    variables = {
        "MASTER_ADDR": "here",
        "MASTER_PORT": "77",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "5",
    }
    assert ranks.rendezvous(variables) == ("here", 77)
    job = {
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_STEP_NODELIST": "n2",
        "SLURM_JOB_ID": "5",
        "SLURM_STEP_ID": "0",
    }
    host, port = ranks.rendezvous(job)
    assert host == "n2" and 15000 <= port < 30000
    assert (
        ranks.rendezvous({**job, "SLURM_JOB_ID": "6"})[1]
        != port
        != ranks.rendezvous({**job, "SLURM_STEP_ID": "1"})[1]
    )
    with pytest.raises(ValueError, match="start with torchrun, or with srun"):
        ranks.rendezvous({})


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({"LOCAL_WORLD_SIZE": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x4)"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "8"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "3,2"}, 8),  # unequal nodes
        ({}, 8),
    ],
)
def test_ranks_of_a_node(environment: dict[str, str], number: int) -> None:
    assert ranks.per_node(environment, Ranks(0, 8)) == number


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({}, 0),
        ({"TORCHELASTIC_RESTART_COUNT": "2"}, 2),
        ({"SLURM_RESTART_COUNT": "3"}, 3),
        ({"SLURM_RESTART_COUNT": ""}, 0),
    ],
)
def test_restarts(environment: dict[str, str], number: int) -> None:
    assert ranks.restarts(environment) == number


def test_a_child_keeps_all_but_its_parents_place() -> None:
    place = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
    }
    kept = {
        "PATH": "/bin",
        "SLURM_CONF": "/etc/slurm.conf",
        "CUDA_VISIBLE_DEVICES": "0",
        "OMP_NUM_THREADS": "1",
    }
    assert (
        ranks.without_place({**place, **kept, "MASTER_ADDR": "x", "TORCHELASTIC_RUN_ID": "y"})
        == kept
    )
    assert ranks.from_environment(ranks.without_place(place)) == Ranks()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ranks.Ranks(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, ranks.Ranks(3, 4, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, ranks.Ranks(3, 4, 0)),
        (
            {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"},
            ranks.Ranks(5, 8, 1),
        ),
        (
            {
                "RANK": "0",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "SLURM_PROCID": "5",
                "SLURM_STEP_NUM_TASKS": "8",
            },
            ranks.Ranks(0, 2, 0),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, ranks.Ranks(0, 1, 0)),
        ({"RANK": "1"}, ranks.Ranks(0, 1, 0)),
    ],
)
def test_the_place_of_a_process_is_torchruns_then_sruns_then_alone(
    environment: dict[str, str], expected: ranks.Ranks
) -> None:
    assert ranks.from_environment(environment) == expected


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "SGE_TASK_ID"])
def test_the_jobs_of_several_schedulers_are_known(name: str) -> None:
    assert ranks.in_batch_job({"PATH": "/bin", name: "123.server"})


def test_a_shell_with_commands_of_a_scheduler_is_no_job() -> None:
    assert not ranks.in_batch_job({"PBS_DEFAULT": "server", "SLURM_CONF": "/etc/slurm.conf"})


@pytest.mark.parametrize(
    ("rank", "world", "local"),
    [("4", "4", "0"), ("-1", "2", "0"), ("x", "2", "0"), ("0", "2", "1")],
)
def test_places_that_cannot_be_are_refused(rank: str, world: str, local: str) -> None:
    with pytest.raises(ValueError, match="the launcher's variables are not valid: RANK="):
        ranks.from_environment({"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local})
