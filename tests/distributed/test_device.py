"""Which device a process takes."""

from __future__ import annotations

import pytest
import torch

from tapct.base.exits import UserError
from tapct.distributed.device import pick_device


@pytest.mark.parametrize(
    ("name", "num_gpus", "local_rank", "device"),
    [
        ("cpu", 2, 0, "cpu"),
        ("auto", 0, 3, "cpu"),
        ("auto", 2, 1, "cuda:1"),
        ("cuda", 2, 0, "cuda:0"),
        ("cuda", 1, 3, "cuda:0"),  # SLURM shows each process only its own GPU
    ],
)
def test_a_process_takes_the_gpu_of_its_local_rank(
    monkeypatch: pytest.MonkeyPatch, name: str, num_gpus: int, local_rank: int, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert str(pick_device(name, local_rank)) == device


@pytest.mark.parametrize(
    ("num_gpus", "local_rank", "line"),
    [(0, 0, "device=cuda, but torch sees no GPU"), (2, 2, "start at most 2 processes per node")],
)
def test_a_missing_gpu_is_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, local_rank: int, line: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(UserError, match=line):
        pick_device("cuda", local_rank)
