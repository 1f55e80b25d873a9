"""FSDP2 sharding of student and teacher.

Student and teacher are sharded alike (`fully_shard` per block; heads and the rest of the backbone
as units of their own) over a mesh: `shard`, or replicate x shard where there are several copies.
float32 master shards; with bf16 the blocks are gathered and computed in bf16, gradients are reduced
in float32. What lies outside of the blocks (positions, final norm) stays float32, so that the
residual stream does. So do the heads, whose matrix products autocast computes in bf16: prototypes
made of rounded gains and directions would change every score.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils import _pytree

from tapct.nn.prototype_loss import PrototypeLoss
from tapct.ssl.student_teacher import Network, StudentTeacher
from tapct.types import TargetSums, Tokens


@functools.cache
def _register_outputs() -> None:
    """Make tensors in what modules return visible to FSDP, which hooks their gradients; once per
    process.
    """
    for noun in (Tokens, PrototypeLoss, TargetSums):
        _pytree.register_dataclass(noun)


def shard(network: Network, mesh: DeviceMesh, *, bf16: bool, keeps_gradient: bool) -> None:
    """Shard a network of the meta device or of this rank's, in place.

    Args:
        network: student, teacher or the teacher's snapshot.
        mesh: one axis `shard`, or replicate x shard.
        bf16: gather the blocks and compute with them in bf16.
        keeps_gradient: the student. The others have no backward pass after which FSDP would free
            the gathered copy, and would compute with a copy from before its last move.
    """
    _register_outputs()
    compute = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32 if bf16 else None,
        cast_forward_inputs=False,
    )  # fmt: skip
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in network.backbone.repeated_blocks():
        fully_shard(block, mesh=mesh, mp_policy=compute, reshard_after_forward=True)
    fully_shard(
        network.backbone, mesh=mesh, mp_policy=whole, reshard_after_forward=not keeps_gradient
    )
    for head in network.heads.values():
        fully_shard(head, mesh=mesh, mp_policy=whole, reshard_after_forward=not keeps_gradient)


def sharder(mesh: DeviceMesh | None, *, bf16: bool) -> Callable[[Network, bool], None] | None:
    """What `StudentTeacher` calls for each network, with whether it is the student; None without a
    mesh, so that nothing is sharded.
    """
    if mesh is None:
        return None
    return lambda network, is_student: shard(network, mesh, bf16=bf16, keeps_gradient=is_student)


def forget_order(pair: StudentTeacher) -> None:
    """Let FSDP forget in which order it gathered the modules of the frozen networks.

    FSDP adds an entry to this list at every forward pass and empties it in the backward pass. The
    frozen networks have none, so their lists would grow at every step.
    """
    for network in pair.frozen():
        for root in (network.backbone, *network.heads.values()):
            if isinstance(root, FSDPModule) and hasattr(root, "reset_iter_state"):  # torch 2.13
                root.reset_iter_state()


def sync_gradients(pair: StudentTeacher, enabled: bool) -> None:
    """Reduce gradients over ranks in the next backward pass, or only add them up here until a later
    one does.
    """
    for module in pair.student.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(enabled, recurse=False)
