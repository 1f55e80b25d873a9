"""The pair that learns from itself: a student, and a teacher that is the student's moving
average.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from tapct.base.exits import UserError
from tapct.config import plugins
from tapct.config.plugins import Plugin
from tapct.distributed.collectives import local_part
from tapct.nn.contracts import Backbone, Loss, SnapshotTimes
from tapct.nn.heads import PrototypeHead


class Network(nn.Module):
    """A backbone and the heads of the losses that have one."""

    def __init__(self, backbone: Backbone, heads: dict[str, PrototypeHead]) -> None:
        super().__init__()
        self.backbone: Backbone = backbone
        self.heads = nn.ModuleDict({module_key(name): head for name, head in heads.items()})

    def submodules(self) -> Iterator[tuple[str, nn.Module]]:
        """What is clipped and logged one by one: the backbone, then each head."""
        yield "backbone", self.backbone
        yield from self.heads.items()


class StudentTeacher(nn.Module):
    """Student, teacher and losses of one run, all on one device.

    Both start equal, heads too, and from the same values on any number of ranks. The teacher has no
    gradient and stays in eval mode. So does the snapshot, a copy of the teacher's backbone at an
    earlier step, which is there only where a loss wants it.

    Args:
        model: the backbone's plug-in section.
        losses: plug-in sections of the losses, in the order in which they are summed.
        seed: random seed of the initial weights.
        device: device of parameters and loss state.
        dtype: dtype of parameters and loss state.
        shard: function that shards a network in place, before it has values; its second argument is
            True for the student. None: this rank holds all of it.
    Raises:
        UserError: no loss is switched on, a loss shares a head that is not there or not equal, or
            two losses want snapshots of different steps.
    """

    snapshot_taken: Tensor

    def __init__(
        self,
        model: Plugin,
        losses: Sequence[Plugin],
        seed: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        shard: Callable[[Network, bool], None] | None = None,
    ) -> None:
        super().__init__()
        if not losses:
            names = ", ".join(plugins.available("losses"))
            raise UserError(f"losses: every term is switched off; keep at least one of {names}")
        self.losses_by_name: dict[str, Loss] = {
            each.name: plugins.load("losses", each.name).build(each.config) for each in losses
        }
        check_heads(self.losses_by_name)
        self.snapshot_times = snapshot_times(self.losses_by_name)
        self.losses = nn.ModuleDict(
            {module_key(name): loss for name, loss in self.losses_by_name.items()}
        ).to(device, dtype)
        owners = list(
            dict.fromkeys(loss.head_of for loss in self.losses_by_name.values() if loss.head_of)
        )
        with torch.device("cpu" if shard is None else "meta"):
            backbone: Backbone = plugins.load("models", model.name).build(model.config)
            heads = {
                name: PrototypeHead(backbone.dim, self.losses_by_name[name].config.head)
                for name in owners
            }
            self.student = Network(backbone, heads).to(dtype)
        self.teacher = copy.deepcopy(self.student)
        self.snapshot: Network | None = None
        if self.snapshot_times is not None:
            self.snapshot = Network(copy.deepcopy(backbone), {})
            # finished steps when it was taken, -1 before; on the CPU, since the host asks at every
            # step
            self.register_buffer("snapshot_taken", torch.tensor(-1))
        for network in (self.student, *self.frozen()):
            if shard is None:
                network.to(device)
            else:
                shard(network, network is self.student)
                network.to_empty(device=device)
                copy_buffers(network.backbone, model)
        self.init_weights(seed)
        for network in self.frozen():
            network.requires_grad_(False).eval()

    def frozen(self) -> list[Network]:
        """The networks without gradient: the teacher and, where there is one, its snapshot."""
        return [self.teacher] if self.snapshot is None else [self.teacher, self.snapshot]

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Set the student from (seed, names of parameters), and teacher and snapshot equal to
        it.
        """
        self.student.backbone.init_weights(seed)
        for index, head in enumerate(self.student.heads.values()):
            head.init_weights(seed + 2 + index)  # type: ignore[operator]
        for teacher, student in zip(
            self.teacher.parameters(), self.student.parameters(), strict=True
        ):
            local_part(teacher).copy_(local_part(student))
        if self.snapshot is not None:
            self.copy_teacher(self.snapshot)

    def train(self, mode: bool = True) -> StudentTeacher:
        """Switch the student; the frozen networks stay in eval mode."""
        super().train(mode)
        for network in self.frozen():
            network.eval()
        return self

    def with_settings(self, losses: Sequence[Plugin]) -> dict[str, Loss]:
        """The same losses with other settings: those that differ are made again and hold what the
        old ones hold.

        Args:
            losses: plug-in sections of the losses of this pair.
        Raises:
            UserError: `check_same_state` refuses it.
        """
        assert [each.name for each in losses] == list(self.losses_by_name)
        terms: dict[str, Loss] = {}
        for each in losses:
            old = terms[each.name] = self.losses_by_name[each.name]
            if old.config == each.config:
                continue
            with torch.random.fork_rng(devices=[]):  # a draw here must not move those of training
                new: Loss = plugins.load("losses", each.name).build(each.config)
            check_same_state(each.name, old, new)
            like = next(self.parameters())
            terms[each.name] = new.to(like.device, like.dtype).train(old.training)
            terms[each.name].load_state_dict(old.state_dict())
        return terms

    def change_losses(self, losses: Sequence[Plugin]) -> None:
        """Continue with other settings of the same losses; see `with_settings`."""
        self.losses_by_name = self.with_settings(losses)
        self.losses = nn.ModuleDict(
            {module_key(name): loss for name, loss in self.losses_by_name.items()}
        )

    def heads_of(self, loss: Loss) -> tuple[nn.Module | None, nn.Module | None]:
        """The student's and the teacher's head for a loss; None for a loss without one."""
        if not loss.head_of:
            return None, None
        key = module_key(loss.head_of)
        return self.student.heads[key], self.teacher.heads[key]

    @torch.no_grad()
    def update_teacher(self, momentum: float, apply: Tensor) -> None:
        """t <- m t + (1 - m) s for the parameters of backbone and heads, once per optimizer step;
        shard by shard.

        Args:
            momentum: m of this step.
            apply: bool scalar on the device; False leaves the teacher as it is, without asking the
                host.
        """
        weight = apply.to(torch.float64) * (1.0 - momentum)
        for teacher, student in zip(
            self.teacher.parameters(), self.student.parameters(), strict=True
        ):
            local_part(teacher).lerp_(local_part(student), weight.to(teacher.dtype))

    def uses_snapshot(self, step: int) -> bool:
        """Whether a loss looks at the snapshot in the step after `step` finished ones."""
        return self.snapshot_times is not None and step >= self.snapshot_times.start

    @torch.no_grad()
    def refresh_snapshot(self, step: int, apply: Tensor) -> None:
        """Take the teacher as it is now, if that is due before the step after `step` finished ones;
        shard by shard.

        Called at the beginning of every optimizer step, so that a checkpoint of this step, without
        it, gives the same.

        Args:
            step: finished optimizer steps.
            apply: bool scalar on the device; False leaves the snapshot's weights as they are,
                without asking the host (a run in which a step was refused ends without a further
                checkpoint).
        """
        if self.snapshot is None or self.snapshot_times is None:
            return
        if self.snapshot_times.due(step, int(self.snapshot_taken)):
            self.copy_teacher(self.snapshot, apply)
            self.snapshot_taken.fill_(step)

    def copy_teacher(self, snapshot: Network, apply: Tensor | None = None) -> None:
        """Make a snapshot equal to the teacher's backbone."""
        for kept, teacher in zip(
            snapshot.backbone.parameters(), self.teacher.backbone.parameters(), strict=True
        ):
            now = local_part(teacher)
            local_part(kept).copy_(
                now if apply is None else torch.where(apply, now, local_part(kept))
            )


def check_same_state(name: str, old: Loss, new: Loss) -> None:
    """Raise UserError where a loss with other settings cannot hold what the old one holds.

    Args:
        name: name of the loss.
        old, new: loss with the old and with the new settings.
    """
    held, holds = ({key: x.shape for key, x in loss.state_dict().items()} for loss in (old, new))
    if old.head_of != new.head_of or held != holds:
        raise UserError(
            f"losses.{name}: these settings need another head or state, so they cannot change"
        )
    if old.snapshot != new.snapshot:
        raise UserError(f"losses.{name}: the teacher's copy has one timetable, which cannot change")


def check_heads(terms: Mapping[str, Loss]) -> None:
    """Raise UserError where a loss shares a head that is not there or that it describes
    otherwise.
    """
    for name, loss in terms.items():
        if not loss.head_of:
            continue
        if loss.head_of not in terms:
            raise UserError(
                f"losses.{name} shares the head of losses.{loss.head_of}, which is switched off"
            )
        if loss.config.head != terms[loss.head_of].config.head:
            raise UserError(
                f"losses.{name} shares the head of losses.{loss.head_of}, but their head sections "
                "differ; "
                f"write losses.{name}.head: ${{losses.{loss.head_of}.head}}"
            )


def snapshot_times(terms: Mapping[str, Loss]) -> SnapshotTimes | None:
    """When the teacher is copied aside, for all losses that want that; None where none does."""
    wanted = {name: loss.snapshot for name, loss in terms.items() if loss.snapshot is not None}
    if len(set(wanted.values())) > 1:
        names = " and ".join(f"losses.{name}" for name in wanted)
        raise UserError(
            f"{names} want snapshots of the teacher at different steps; there is one: give them "
            "equal ones"
        )
    return next(iter(wanted.values()), None)


@torch.no_grad()
def copy_buffers(backbone: Backbone, model: Plugin) -> None:
    """Give a backbone that was built without values the buffers that its constructor makes."""
    if any(True for _ in backbone.buffers()):
        made: Backbone = plugins.load("models", model.name).build(model.config)
        for mine, value in zip(backbone.buffers(), made.buffers(), strict=True):
            mine.copy_(value)


def module_key(name: str) -> str:
    """Name of a plug-in as torch takes it for a submodule: a user's `mylab.foo` becomes
    `mylab/foo`.
    """
    return name.replace(".", "/")


def build_backbone(model: Plugin, seed: int) -> Backbone:
    """The backbone with the initial weights of a run: the same for the same section and seed."""
    backbone: Backbone = plugins.load("models", model.name).build(model.config)
    backbone.init_weights(seed)
    return backbone
