"""What the plug-ins of `models` and `losses` must offer; a new one inherits from these."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tapct.base.exits import UserError
from tapct.base.geometry import Grid, Size3
from tapct.nn.layers import DropKey
from tapct.nn.posembed import resize_positions
from tapct.types import LossResult, Tokens, TokenSets


@dataclass(frozen=True)
class LayerCost:
    """One part of a backbone, as `tapct plan` lists it.

    Args:
        name: part, e.g. attention.
        parameters: number of its parameters.
        flops: FLOPs of its matrix products in the forward pass of one crop (a multiply-add is 2).
        trained_share: share of these FLOPs that the student computes on average; less than 1 where
            stochastic depth skips crops.
    """

    name: str
    parameters: int
    flops: float
    trained_share: float = 1.0


@dataclass(frozen=True)
class CropCost:
    """The forward pass of one crop through a backbone.

    Args:
        tokens: tokens of the crop, class token and registers included.
        layers: parts of the backbone, from the input on; together they have all its parameters.
    """

    tokens: int
    layers: tuple[LayerCost, ...]


class Backbone(nn.Module):
    """A network from crops to tokens.

    The plug-in's `Config` has `patch` too, as a field or a property: views are checked against it
    before there is a backbone.

    Attributes:
        dim: channels D of a token.
        patch: voxels (z, y, x) of a patch.
        num_blocks: layers between embedding and final norm, for layer-wise learning rates.
        needs_spacing: it works in mm. Only then is `forward` given `spacing_mm`, so that others
            need no such argument.
        attention: attention back-end that its `Config` asks for, a name of `tapct.nn.backends`;
            empty where it has no choice.
        position_grid: patches (z, y, x) that its parameter `pos_embed` has positions for; None
            where it learns none.
    """

    dim: int
    patch: Size3
    num_blocks: int
    needs_spacing: bool = False
    attention: str = ""
    position_grid: Grid | None = None

    def __call__(self, crops: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        """Call `forward`, after a check that `crops` is a list of groups; see `check_groups`."""
        check_groups(crops)
        return super().__call__(crops, *args, **kwargs)

    @abstractmethod
    def forward(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        key: DropKey | None = None,
    ) -> list[Tokens]:
        """Encode groups of crops (B, Z, Y, X), one `Tokens` per group.

        One that `needs_spacing` takes a fourth argument `spacing_mm`: per group float32 (B, 3), the
        mm per voxel of each crop along (z, y, x), after it was cut and resized.

        Args:
            crops: groups, each of one size, normalised.
            masks: per group bool (B, N), True where the mask token stands for the patch; None for
                none.
            key: key of draws in training, such as stochastic depth; None, or eval mode, for none.
        """

    def tokens_of_blocks(
        self,
        crops: Sequence[Tensor],
        blocks: Sequence[int],
        spacing_mm: Sequence[Tensor] | None = None,
    ) -> dict[int, list[Tokens]]:
        """Encode groups of crops once and return the tokens after several blocks.

        By default only the last block is known. A backbone that overrides this method must not run
        its blocks more than once.

        Args:
            crops: groups, as in `forward`.
            blocks: numbers of the blocks, counted from 0.
            spacing_mm: spacing of the groups, for a backbone that `needs_spacing`.
        Returns:
            Block -> one `Tokens` per group, each after the final norm.
        Raises:
            UserError: the backbone cannot return the tokens of one of these blocks.
        """
        last = self.num_blocks - 1
        self.check_blocks(blocks)
        others = sorted(set(blocks) - {last})
        if others:
            raise UserError(
                f"{type(self).__name__} returns the tokens of its last block ({last}) alone, and "
                f"block {others[0]} was asked for; implement tokens_of_blocks in the backbone, or "
                "choose the last block"
            )
        if self.needs_spacing and spacing_mm is not None:
            return {last: self(crops, spacing_mm=spacing_mm)}
        return {last: self(crops)}

    def tokens_before_norm(
        self,
        crops: Sequence[Tensor],
        blocks: Sequence[int],
        spacing_mm: Sequence[Tensor] | None = None,
    ) -> dict[int, list[Tokens]]:
        """`tokens_of_blocks` without the final norm; by default no backbone knows them.

        Raises:
            UserError: the backbone cannot return them.
        """
        raise UserError(
            f"{type(self).__name__} returns tokens after its final norm only; call with norm=True"
        )

    def check_blocks(self, blocks: Sequence[int]) -> None:
        """Raise UserError where a number is that of no block."""
        for block in blocks:
            if not 0 <= block < self.num_blocks:
                raise UserError(
                    f"block {block} does not exist: {type(self).__name__} has the blocks 0 to "
                    f"{self.num_blocks - 1}"
                )

    @abstractmethod
    def param_group_id(self, name: str) -> int:
        """Layer of a parameter: embeddings and tokens 0, block i i + 1, final norm num_blocks +
        1.
        """

    @abstractmethod
    def init_weights(self, seed: int) -> None:
        """Set every parameter; equal seeds give equal weights, on any number of ranks.

        The module may have been built on the meta device and sharded since: write through
        `tapct.nn.init`.
        """

    def repeated_blocks(self) -> list[nn.Module]:
        """Layers that FSDP gathers one at a time, and that `train.compile` and `train.recompute`
        work on.

        By default the `nn.ModuleList` named `blocks`, and none where there is no such list.
        """
        blocks = self._modules.get("blocks")
        return list(blocks) if isinstance(blocks, nn.ModuleList) else []

    def resized_positions(self, pos_ND: Tensor, native: Grid, grid: Grid) -> Tensor:
        """Learned positions for another grid, as `forward` resizes them for a crop of that size.

        Args:
            pos_ND: one vector per patch of the native grid, in (z, y, x) raster order.
            native: patches of the native grid along (z, y, x).
            grid: patches of the result along (z, y, x).
        """
        return resize_positions(pos_ND, native, grid)

    def crop_cost(self, window: Size3) -> CropCost | None:
        """FLOPs and parameters for `tapct plan`; None, the default, where they are not known.

        Args:
            window: voxels (z, y, x) of the crop, a multiple of the patch.
        """
        return None

    def export_config(self) -> Any:
        """The `Config` to write into an export, which must run on any machine; None, the default,
        for that of training.
        """
        return None

    def transformers_config(self) -> dict[str, Any] | None:
        """The sizes of the backbone as `TAPCTConfig` of weights/huggingface/modeling_tapct.py names
        them, for an export that Hugging Face transformers loads; None, the default, where that file
        cannot compute this backbone.
        """
        return None

    def untrained_variants(self) -> dict[str, Any]:
        """Further `Config`s that evaluation shows untrained beside the run's own, by name."""
        return {}

    def wider(self, factor: int) -> Any:
        """A `Config` of the same depth with `factor` times the channels, which evaluation shows
        untrained (`random_2x`, `random_4x`); None, the default, where there is none.
        """
        return None


def check_groups(crops: Sequence[Tensor]) -> None:
    """Raise UserError where one tensor stands for the list of groups, or a group is no tensor of
    floats.

    Python would take the first axis of a tensor as groups: a batch (B, 1, Z, Y, X) would be B
    groups of one crop. Whole numbers are HU that nobody has normalised.
    """
    if isinstance(crops, Tensor):
        raise UserError(
            f"crops are one tensor of shape {tuple(crops.shape)}: a backbone takes a list of "
            "groups, each (B, Z, Y, X); call it with [crops], without an axis for one channel"
        )
    for group in crops:
        if not isinstance(group, Tensor) or not group.is_floating_point():
            kind = group.dtype if isinstance(group, Tensor) else type(group).__name__
            raise UserError(
                f"a group of crops is {kind}; rule: a tensor of floats, HU after "
                "contract.normalise(hu), which clips and scales them"
            )


def num_blocks_of(backbone: nn.Module) -> int:
    """Number of blocks of a backbone; a module without blocks, such as raw HU, counts as one."""
    return int(getattr(backbone, "num_blocks", 1))


def encode_blocks(
    backbone: nn.Module,
    crops: Sequence[Tensor],
    blocks: Sequence[int],
    spacing_mm: Sequence[Tensor] | None = None,
) -> dict[int, list[Tokens]]:
    """Call `Backbone.tokens_of_blocks`, or `forward` of a module that is no `Backbone` and whose
    only block is its last one; arguments as there.
    """
    if isinstance(backbone, Backbone):
        return backbone.tokens_of_blocks(crops, blocks, spacing_mm)
    last = num_blocks_of(backbone) - 1
    assert set(blocks) <= {last}, (blocks, last)
    if getattr(backbone, "needs_spacing", False) and spacing_mm is not None:
        return {last: backbone(crops, spacing_mm=spacing_mm)}
    return {last: backbone(crops)}


def encode(
    backbone: nn.Module,
    crops: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    key: DropKey | None,
    spacing_mm: Sequence[Tensor],
) -> list[Tokens]:
    """Call a backbone, with the spacing where it needs it; arguments as in
    `Backbone.forward`.
    """
    given = (
        (crops, masks, key, spacing_mm)
        if getattr(backbone, "needs_spacing", False)
        else (crops, masks, key)
    )
    tokens: list[Tokens] = backbone(*given)
    return tokens


@dataclass(frozen=True)
class SnapshotTimes:
    """When the teacher's backbone is copied aside for a loss that uses an earlier teacher.

    Args:
        start: finished optimizer steps at the first copy; before that there is none.
        every: steps from one copy to the next; 0: only the first.
    """

    start: int
    every: int

    def due(self, step: int, taken: int) -> bool:
        """Whether a copy is made before the step after `step` finished ones.

        Args:
            taken: finished steps at the last copy, -1 for none. One that is missing is made at
                once.
        """
        on_time = self.every > 0 and (step - self.start) % self.every == 0
        return step >= self.start and (on_time or taken < self.start)


@dataclass(frozen=True)
class HeadRows:
    """Tokens that a loss sends through its head, of one sample.

    Args:
        student: rows of the student, with gradient.
        teacher: rows of the teacher.
        balanced: whether the teacher's rows of a micro-batch are spread evenly over the prototypes
            (Sinkhorn), which few rows cannot do with many prototypes.
    """

    student: float
    teacher: float
    balanced: bool = False


@dataclass(frozen=True)
class LossInputs:
    """What a loss will be given in training, as the config gives it before there is a batch.

    Args:
        num_globals: global crops of a sample.
        num_locals: local crops of a sample.
        num_masked: masked patches of an optimizer step, all global crops together.
        all_masked: whether every patch of every global crop is masked.
        teacher_temp: highest temperature of the teacher in the run.
    """

    num_globals: int
    num_locals: int
    num_masked: int
    all_masked: bool
    teacher_temp: float


class Loss(nn.Module):
    """Tokens of student and teacher in, weighted terms out.

    Attributes:
        head_of: name of the loss whose head it uses (its own, or another's), empty for none.
        config: its own `Config`; with a field `head` where it owns or shares one.
        snapshot: when the frozen copy of the teacher is taken that `TokenSets.snapshot_global`
            comes from; None where it needs none, and then none is made.
        min_samples_reason: what `min_samples` is needed for and, if there is one, the setting that
            changes it; printed in the error line.
    """

    head_of: str
    config: Any
    snapshot: SnapshotTimes | None = None
    min_samples_reason: str = ""

    @abstractmethod
    def forward(
        self, sets: TokenSets, student_head: nn.Module | None, teacher_head: nn.Module | None
    ) -> LossResult:
        """The terms of one micro-batch.

        Args:
            sets: tokens and masks.
            student_head: maps tokens to prototype logits; None where `head_of` is empty.
            teacher_head: the same, of the teacher.
        """

    def min_samples(self, world: int) -> int:
        """Fewest samples that a micro-batch of a rank must hold; 1 by default.

        Training, `tapct plan` and `tapct submit` refuse smaller ones.

        Args:
            world: number of ranks.
        """
        return 1

    def problem(self, inputs: LossInputs) -> str:
        """Why the loss cannot be computed from these inputs, as a clause; empty, the default, where
        it can. Training refuses such a config before its first step.

        Args:
            inputs: numbers of crops and masked patches.
        """
        return ""

    def warnings(self, inputs: LossInputs) -> list[str]:
        """Why the loss will probably not do what is intended, one clause each; none by default."""
        return []

    def prototype_rows(
        self, num_globals: int, num_locals: int, num_masked: float
    ) -> HeadRows | None:
        """Tokens of a sample that go through the head, for `tapct plan`; None without a head.

        Args:
            num_globals: global crops of a sample.
            num_locals: local crops of a sample.
            num_masked: masked patches of a sample, all its global crops together, on average.
        """
        return None

    def pending(self) -> tuple[Tensor, ...]:
        """Buffers that hold sums of this step; they are added up over ranks, in place, before
        `finish_step`.
        """
        return ()

    @abstractmethod
    def finish_step(self, apply: Tensor) -> None:
        """Called once per optimizer step, after it.

        Args:
            apply: bool scalar on the device; False where the step was refused, so that no state may
                move.
        """
