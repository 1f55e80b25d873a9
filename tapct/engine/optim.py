"""Parameter groups, clipping, AdamW and the teacher's move: everything between backward and the next step."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tapct.config import setting
from tapct.nn.contracts import Backbone
from tapct.ssl import schedules
from tapct.ssl.schedules import StepValues
from tapct.ssl.student_teacher import Network, StudentTeacher


@dataclass(frozen=True)
class Config(schedules.OptimSchedule):
    """AdamW with layer-wise learning rates; the schedules' fields come first."""

    betas: tuple[float, float] = setting((0.9, 0.999), "AdamW moments; DINOv2", ge=0.0, lt=1.0)
    clip_norm: float = setting(3.0, "gradient norm of backbone and each head, clipped one by one; DINOv2", gt=0.0)
    layer_decay: float = setting(0.9, "learning rate factor per block from the output down; DINOv2", gt=0.0, le=1.0)
    patch_embed_lr_factor: float = setting(0.2, "further factor for the patch embedding; DINOv2", gt=0.0, le=1.0)


@dataclass(frozen=True)
class GroupKey:
    """What the parameters of one group share.

    Args:
        lr_factor: times the schedule's learning rate.
        decays: whether weight decay applies.
        is_last_layer: whether its learning rate is 0 while the last layer is frozen.
    """

    lr_factor: float
    decays: bool
    is_last_layer: bool


NO_DECAY = re.compile(r"(\.bias$)|(norm)|(\.gamma$)")


def group_key(name: str, backbone: Backbone, config: Config) -> GroupKey:
    """The group of one parameter of the student.

    Layer ids as in DINOv2: embeddings and tokens 0, block i is i + 1, the final norm and the heads stand at depth + 1,
    so that their factor is 1. Biases, norms and LayerScale are not decayed; tokens, positions and the last layer's gain
    are.

    Args:
        name: dotted name within `Network`, e.g. `backbone.blocks.3.attn.qkv.weight`.
        backbone: tells the layer of its own parameters.
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
        applied: bool, False when something was not finite and nothing moved.
    """

    grad_norms: tuple[tuple[str, Tensor], ...]
    applied: Tensor


class Updater:
    """Moves student, teacher and loss state once per optimizer step, and never on a value that is not finite.

    The check stays on the device: `bad` is a latch that the fused AdamW reads as its `found_inf`, that gates teacher
    and centres, and that the loop fetches with the metrics. Once set, nothing moves any more.

    Args:
        pair: student and teacher.
        config: groups, clipping, AdamW.
    """

    def __init__(self, pair: StudentTeacher, config: Config) -> None:
        self.pair = pair
        self.config = config
        members: dict[GroupKey, list[nn.Parameter]] = {}
        for name, parameter in pair.student.named_parameters():
            if parameter.requires_grad:
                members.setdefault(group_key(name, pair.student.backbone, config), []).append(parameter)
        self.keys = list(members)
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters} for parameters in members.values()], lr=0.0, betas=config.betas, fused=True
        )
        device = next(pair.parameters()).device
        self.bad = torch.zeros((), device=device)
        self.optimizer.found_inf = self.bad  # type: ignore[attr-defined]  # read by the fused kernel, as GradScaler sets it
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]

    def step(self, values: StepValues, total: Tensor) -> UpdateReport:
        """Clip, check, AdamW, teacher, centres; then forget the gradients.

        Args:
            values: of the schedules at this step.
            total: scalar loss of the step, the mean over its micro-batches.
        """
        norms = clip_submodules(self.pair.student, self.config.clip_norm)
        finite = torch.stack([torch.isfinite(x) for x in (total.detach(), *(norm for _, norm in norms))]).all()
        self.bad.copy_(torch.maximum(self.bad, 1.0 - finite.to(self.bad.dtype)))
        applied = self.bad == 0
        for key, group in zip(self.keys, self.optimizer.param_groups, strict=True):
            frozen = key.is_last_layer and values.last_layer_frozen
            group["lr"] = 0.0 if frozen else values.lr * key.lr_factor
            group["weight_decay"] = values.wd if key.decays else 0.0
        self.optimizer.step()
        self.pair.update_teacher(values.momentum, applied)
        for loss in self.pair.terms.values():
            loss.finish_step(applied)
        self.optimizer.zero_grad(set_to_none=True)
        return UpdateReport(norms, applied)


def clip_submodules(student: Network, max_norm: float) -> tuple[tuple[str, Tensor], ...]:
    """Clip the gradient norm of each submodule by itself, without asking the host.

    Parameters without a gradient take no part.

    Returns:
        name and norm before clipping of each submodule.
    """
    norms = []
    for name, module in student.submodules():
        parameters = [p for p in module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients(parameters))
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        norms.append((name, norm))
    return tuple(norms)


def gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients that are there."""
    return [p.grad for p in parameters if p.grad is not None]
