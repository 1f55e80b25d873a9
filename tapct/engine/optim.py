"""Parameter groups, clipping, AdamW and the teacher's move: everything between backward and the
next step.

Axis: W ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tapct.config import setting
from tapct.distributed.collectives import Packet, local_part, own_slot
from tapct.nn.contracts import Backbone
from tapct.ssl import schedules
from tapct.ssl.schedules import StepValues
from tapct.ssl.student_teacher import Network, StudentTeacher


@dataclass(frozen=True)
class Config(schedules.OptimSchedule):
    """AdamW with layer-wise learning rates, and the schedules of a run."""

    betas: tuple[float, float] = setting(
        (0.9, 0.999), "decay rates of AdamW's moments; DINOv2", ge=0.0, lt=1.0
    )
    clip_norm: float = setting(
        3.0, "maximum gradient norm, for the backbone and for each head separately; DINOv2", ge=1e-6
    )
    layer_decay: float = setting(
        0.9,
        "the learning rate of a block is the learning rate of the next block (nearer to the "
        "output), multiplied by this factor; DINOv2",
        gt=0.0,
        le=1.0,
    )
    patch_embed_lr_factor: float = setting(
        0.2, "additional factor on the learning rate of the patch embedding; DINOv2", gt=0.0, le=1.0
    )


@dataclass(frozen=True)
class GroupKey:
    """What the parameters of one group share.

    Args:
        lr_factor: factor on the schedule's learning rate.
        decays: whether weight decay applies.
        is_last_layer: whether its learning rate is 0 while the last layer is frozen.
    """

    lr_factor: float
    decays: bool
    is_last_layer: bool


NO_DECAY = re.compile(r"(\.bias$)|(norm)|(\.gamma$)")


def group_key(name: str, backbone: Backbone, config: Config) -> GroupKey:
    """The group of one parameter of the student.

    Layer ids as in DINOv2: embeddings and tokens 0, block i is i + 1, the final norm and the heads
    stand at depth + 1, so that their factor is 1. Biases, norms and LayerScale are not decayed;
    tokens, positions and the last layer's gain are.

    Args:
        name: dotted name within `Network`, e.g. `backbone.blocks.3.attn.qkv.weight`.
        backbone: backbone of the student, which knows the layer of each parameter.
        config: layer decay and patch-embedding factor.
    """
    decays = NO_DECAY.search("." + name) is None
    part, _, rest = name.partition(".")
    if part != "backbone":
        return GroupKey(1.0, decays, is_last_layer="last_layer" in rest)
    factor = config.layer_decay ** (backbone.num_blocks + 1 - backbone.param_group_id(rest))
    if rest.startswith("patch_embed."):
        factor *= config.patch_embed_lr_factor
    return GroupKey(factor, decays, is_last_layer=False)


@dataclass(frozen=True)
class UpdateReport:
    """What one optimizer step did; scalars on the device.

    Args:
        grad_norms: name of the submodule and its gradient norm before clipping.
        not_finite_W: 1 for each rank whose loss was not finite, else 0.
        applied: bool, False when something was not finite and nothing moved.
    """

    grad_norms: tuple[tuple[str, Tensor], ...]
    not_finite_W: Tensor
    applied: Tensor


class Updater:
    """Moves student, teacher and loss state once per optimizer step, and never on a value that is
    not finite.

    The check stays on the device: `bad` is a latch that the fused AdamW reads as its `found_inf`,
    that gates teacher and centres, and that the loop fetches with the metrics. Once set, nothing
    moves any more. All that ranks have to agree on (gradient norms, finiteness, centres) goes
    through one collective per step.

    Args:
        pair: student and teacher, sharded or whole.
        config: groups, clipping, AdamW.
        num_copies: how many ranks hold the same shard.
    """

    def __init__(self, pair: StudentTeacher, config: Config, num_copies: int = 1) -> None:
        self.pair, self.config, self.num_copies = pair, config, num_copies
        members: dict[GroupKey, list[nn.Parameter]] = {}
        for name, parameter in pair.student.named_parameters():
            if parameter.requires_grad:
                members.setdefault(group_key(name, pair.student.backbone, config), []).append(
                    parameter
                )
        self.keys = list(members)
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters} for parameters in members.values()],
            lr=0.0,
            betas=config.betas,
            fused=True,
        )
        device = next(pair.parameters()).device
        self.bad = torch.zeros((), device=device)
        # read by the fused kernel, as GradScaler sets it
        self.optimizer.found_inf = self.bad  # type: ignore[attr-defined]
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]

    @property
    def is_finite(self) -> Tensor:
        """Bool scalar on the device: whether all losses and gradients so far were finite."""
        return self.bad == 0

    def step(
        self,
        values: StepValues,
        total: Tensor,
        packet: Packet | None = None,
        agreed: Callable[[], object] = lambda: None,
    ) -> UpdateReport:
        """Clip, check, AdamW, teacher, centres; then forget the gradients.

        Args:
            values: values of the schedules at this step.
            total: scalar loss of this rank, the mean over its micro-batches.
            packet: other numbers that ranks add up in the same collective; reduced when this
                returns.
            agreed: function that is called after that collective.
        """
        packet = Packet() if packet is None else packet
        packet.sum(
            "update/not_finite",
            own_slot(1.0 - torch.isfinite(total.detach()).float(), self.bad.device),
        )
        for name, square in square_norms(self.pair.student).items():
            packet.sum(f"update/square_norm/{name}", square / self.num_copies)
        pending: dict[str, Tensor] = {}
        for name, loss in self.pair.losses_by_name.items():
            for i, buffer in enumerate(loss.pending()):
                pending[f"pending/{name}/{i}"] = buffer
        for name, buffer in pending.items():
            packet.sum(name, buffer)
        packet.reduce()
        agreed()
        for name, buffer in pending.items():
            buffer.copy_(packet[name])

        norms = {
            name: packet[f"update/square_norm/{name}"].sqrt()
            for name, _ in self.pair.student.submodules()
        }
        clip(self.pair.student, norms, self.config.clip_norm)
        finite = torch.stack(
            [
                packet["update/not_finite"].sum() == 0,
                *(torch.isfinite(norm) for norm in norms.values()),
            ]
        ).all()
        self.bad.copy_(torch.maximum(self.bad, 1.0 - finite.to(self.bad.dtype)))
        applied = self.is_finite
        for key, group in zip(self.keys, self.optimizer.param_groups, strict=True):
            frozen = key.is_last_layer and values.last_layer_frozen
            group["lr"] = 0.0 if frozen else values.lr * key.lr_factor
            group["weight_decay"] = values.wd if key.decays else 0.0
            # set again in each step: loading a checkpoint replaces them by those of its stage
            group["betas"] = self.config.betas
        self.optimizer.step()
        self.pair.update_teacher(values.momentum, applied)
        for loss in self.pair.losses_by_name.values():
            loss.finish_step(applied)
        self.optimizer.zero_grad(set_to_none=True)
        return UpdateReport(tuple(norms.items()), packet["update/not_finite"].clone(), applied)


def square_norms(student: Network) -> dict[str, Tensor]:
    """Sum of the squared gradients that this rank holds, of each submodule; parameters without one
    take no part.
    """
    squares = {}
    for name, module in student.submodules():
        gradients = local_gradients(module)
        if gradients:
            squares[name] = torch.stack(torch._foreach_norm(gradients)).square().sum()
        else:
            squares[name] = torch.zeros((), device=next(module.parameters()).device)
    return squares


@torch.no_grad()
def clip(student: Network, norms: Mapping[str, Tensor], max_norm: float) -> None:
    """Scale the gradients of each submodule by itself down to a norm, without asking the host.

    Args:
        norms: norm of the whole gradient of each submodule, over all ranks.
    """
    for name, module in student.submodules():
        gradients = local_gradients(module)
        if gradients:
            # 1e-6 as torch.nn.utils.clip_grad_norm_
            factor = (max_norm / (norms[name] + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))


def local_gradients(module: nn.Module) -> list[Tensor]:
    """The gradients that are there, or this rank's shards of them."""
    return [local_part(p.grad) for p in module.parameters() if p.grad is not None]
