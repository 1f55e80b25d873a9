"""What ranks tell each other: thin words over torch.distributed, and nothing at all when there is
one process.

R rows of one rank, W ranks, D channels. Every function is a collective: all ranks call it, in the
same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tapct.base.exits import SharedError, UserError

T = TypeVar("T")


def world_size() -> int:
    """Ranks of the process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Of this process; 0 where there is no process group."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_(x: Tensor) -> Tensor:
    """Sum over ranks, in place; every rank gets the same bits."""
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.SUM)
    return x


def max_(x: Tensor) -> Tensor:
    """Maximum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def gather(x: Tensor) -> Tensor:
    """Equal shapes of all ranks -> (W, *shape), in rank order; no gradient."""
    if world_size() == 1:
        return x[None]
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts)


class _GatherWithGradient(torch.autograd.Function):
    """Forward: gather. Backward: what all ranks' losses want of this rank's rows, summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gather(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_(gradients[0].contiguous().clone())[rank()]


def gather_with_gradient(x: Tensor) -> Tensor:
    """Equal shapes of all ranks -> (W, *shape), in rank order.

    The gradient of a rank's own tensor is the sum of what every rank's loss says about it. With a
    loss per rank and gradients that are averaged over ranks, that is the gradient of the mean of
    the losses.
    """
    if world_size() == 1:
        return x[None]
    gathered: Tensor = _GatherWithGradient.apply(x)
    return gathered


def from_first(make: Callable[[], T]) -> T:
    """What the first rank makes, on every rank.

    For what should be looked up once and may come out differently when each rank looks for itself:
    files above all.

    Raises:
        SharedError: on every rank, where it was a UserError or OSError on the first.
    """
    if world_size() == 1:
        return make()
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = make()
        except (UserError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise SharedError(str(answer[1]))
    return cast(T, answer[0])


def own_slot(value: float | Tensor, device: torch.device) -> Tensor:
    """A number of this rank among zeros for the others: (W,) float32, whose sum over ranks holds
    everyone's.
    """
    slots_W = torch.zeros(world_size(), device=device)
    slots_W[rank()] = value  # filled where it lies, so that the host does not wait
    return slots_W


class Packet:
    """Numbers of one step that all ranks add up in one collective.

    Put in with `sum` and `mean`, then `reduce` once, then take out by name. They travel as float64,
    so that neither counts nor the last digits of a float64 run are lost; one process hands back
    what was put in.
    """

    def __init__(self) -> None:
        self.parts: dict[str, Tensor] = {}

    def sum(self, name: str, x: Tensor) -> None:
        """To be added up over ranks."""
        assert name not in self.parts, f"{name} is in the packet already"
        self.parts[name] = x.detach()

    def mean(self, name: str, x: Tensor) -> None:
        """To be averaged over ranks."""
        self.sum(name, x.detach() / world_size() if world_size() > 1 else x)

    def reduce(self) -> None:
        """The collective."""
        if world_size() == 1 or not self.parts:
            return
        flat = sum_(torch.cat([part.double().flatten() for part in self.parts.values()]))
        pieces = flat.split([part.numel() for part in self.parts.values()])
        self.parts = {
            name: new.view(old.shape)
            for (name, old), new in zip(self.parts.items(), pieces, strict=True)
        }

    def __getitem__(self, name: str) -> Tensor:
        """A part; clone what outlives the step, or it keeps the whole packet in memory."""
        return self.parts[name]


def local_part(x: Tensor) -> Tensor:
    """The shard that this rank holds, without communication; an ordinary tensor is its own."""
    return x.to_local() if isinstance(x, DTensor) else x


def part_of_full(full: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of a tensor that every rank knows in full.

    Args:
        full: the whole value.
        like: the sharded (FSDP2: along the first axis) or ordinary tensor that it is for.
    """
    if not isinstance(like, DTensor):
        return full
    for axis, placement in enumerate(like.placements):
        if placement.is_shard():
            dim = placement.dim  # type: ignore[attr-defined]
            chunks = full.chunk(
                like.device_mesh.size(axis), dim=dim
            )  # as torch shards: the last ranks may get none
            place = like.device_mesh.get_local_rank(axis)
            full = chunks[place] if place < len(chunks) else full.narrow(dim, 0, 0)
    return full
