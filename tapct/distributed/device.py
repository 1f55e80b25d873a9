"""Choose the device of this process."""

from __future__ import annotations

import torch

from tapct.base.exits import UserError


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Pick the device of this process.

    Args:
        name: auto, cpu or cuda; auto picks a GPU where torch sees one.
        local_rank: number of this process on its node; picks its GPU if more than one is visible.
    Raises:
        UserError: the name is cuda and there is no GPU for this process.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "device=cuda, but torch sees no GPU here; set device=cpu, or run where `nvidia-smi` "
            "lists one"
        )
    visible = torch.cuda.device_count()
    if visible == 1:  # SLURM may show each process only its own GPU
        return torch.device("cuda", 0)
    if local_rank >= visible:
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: {visible} are visible; start at most "
            f"{visible} processes per node"
        )
    return torch.device("cuda", local_rank)
