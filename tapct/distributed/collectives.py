"""Collectives: thin functions over torch.distributed, which do nothing for a single process.

W ranks. All ranks must call each function that communicates, and in the same order.
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
    """Number of ranks of the process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process; 0 where there is no process group."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_(x: Tensor) -> Tensor:
    """Sum over ranks, in place; every rank receives the same bits."""
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.SUM)
    return x


def max_(x: Tensor) -> Tensor:
    """Maximum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def gather(x: Tensor) -> Tensor:
    """Stack the tensors of all ranks in rank order, without a gradient.

    Args:
        x: tensor of this rank; its shape is the same on all ranks.
    Returns:
        Tensor of shape (W, *shape).
    """
    if world_size() == 1:
        return x[None]
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts)


class _GatherWithGradient(torch.autograd.Function):
    """Forward: gather. Backward: sum over ranks of the gradient for this rank's tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gather(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_(gradients[0].contiguous().clone())[rank()]


def gather_with_gradient(x: Tensor) -> Tensor:
    """Stack the tensors of all ranks in rank order, with a gradient.

    The gradient of a rank's own tensor is the sum of its gradients in the losses of all ranks. With
    one loss per rank and gradients that are averaged over ranks, that is the gradient of the mean
    of the losses.

    Args:
        x: tensor of this rank; its shape is the same on all ranks.
    Returns:
        Tensor of shape (W, *shape).
    """
    if world_size() == 1:
        return x[None]
    gathered: Tensor = _GatherWithGradient.apply(x)
    return gathered


def from_first(make: Callable[[], T]) -> T:
    """Compute something on the first rank and hand the result to all ranks.

    This is for results that could differ if each rank computed them, the content of files above
    all.

    Args:
        make: function that only the first rank calls; its result is pickled.
    Raises:
        SharedError: `make` raised a UserError or an OSError; raised on every rank.
    """
    if world_size() == 1:
        return make()
    outcome: list[Any] = [None, None]  # result, error
    if rank() == 0:
        try:
            outcome[0] = make()
        except (UserError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome
    if failure is not None:
        raise SharedError(str(failure))
    return cast(T, result)


def own_slot(value: float | Tensor, device: torch.device) -> Tensor:
    """A vector with a number of this rank and zeros for the others; its sum over ranks holds the
    numbers of all ranks.

    Args:
        value: number of this rank.
        device: device of the vector.
    Returns:
        float32 tensor of shape (W,).
    """
    slots_W = torch.zeros(world_size(), device=device)
    # `slots_W[rank()] = value` would copy a number of the host to a GPU, and wait for the copy
    slots_W[rank()].fill_(value)
    return slots_W


class Packet:
    """Numbers of one step that are summed over ranks in one collective.

    Add parts with `sum` and `mean`, call `reduce` once, then read the parts by name. They are sent
    as float64, so that neither counts nor the last digits of a float64 run are lost. A single
    process reads what was added.
    """

    def __init__(self) -> None:
        self.parts: dict[str, Tensor] = {}

    def sum(self, name: str, x: Tensor) -> None:
        """Add a part that is summed over ranks."""
        assert name not in self.parts, f"{name} is in the packet already"
        self.parts[name] = x.detach()

    def mean(self, name: str, x: Tensor) -> None:
        """Add a part that is averaged over ranks."""
        self.sum(name, x.detach() / world_size() if world_size() > 1 else x)

    def reduce(self) -> None:
        """Sum all parts over ranks, in one collective."""
        if world_size() == 1 or not self.parts:
            return
        flat = sum_(torch.cat([part.double().flatten() for part in self.parts.values()]))
        pieces = flat.split([part.numel() for part in self.parts.values()])
        for (name, part), piece in zip(list(self.parts.items()), pieces, strict=True):
            self.parts[name] = piece.view(part.shape)

    def __getitem__(self, name: str) -> Tensor:
        """Read a part; clone what outlives the step, or it keeps the whole packet in memory."""
        return self.parts[name]


def local_part(x: Tensor) -> Tensor:
    """The shard that this rank holds, without communication; an ordinary tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def part_of_full(full: Tensor, like: Tensor) -> Tensor:
    """The shard of this rank of a tensor that every rank holds in full.

    Args:
        full: full tensor.
        like: sharded tensor (FSDP2 shards along the first axis) whose placement is used, or an
            ordinary tensor, which means the full one.
    """
    if not isinstance(like, DTensor):
        return full
    for axis, placement in enumerate(like.placements):
        if placement.is_shard():
            dim = placement.dim  # type: ignore[attr-defined]
            # torch shards in the same way; the last ranks may hold no row
            chunks = full.chunk(like.device_mesh.size(axis), dim=dim)
            place = like.device_mesh.get_local_rank(axis)
            full = chunks[place] if place < len(chunks) else full.narrow(dim, 0, 0)
    return full
