"""Bring the weights of a source into the shapes of a backbone, and report what became of each.

| kind | meaning |
|---|---|
| loaded | the values of the source, as they are |
| resized | positions of another window, or the kernel of another patch size |
| inflated | a 2D kernel spread over depth, RGB kernels summed, or positions repeated along z |
| missing | the source lacks it; it keeps its initial values |
| unexpected | the source has it and the backbone does not |

All but `loaded` must be allowed by name; `resized` allows `inflated` too, since both bring values
to another shape. Weights of which nothing is loaded are an error.

Axes: N patches, D channels.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tapct.base.counted import counted
from tapct.base.exits import SharedError
from tapct.base.geometry import Grid, Size3, times
from tapct.nn.contracts import Backbone
from tapct.types import FIT_KINDS
from tapct.weights import inflate
from tapct.weights.sources import SourceWeights

KERNEL, POSITIONS = "patch_embed.proj.weight", "pos_embed"
MOST_NAMES = 4  # of parameters that one line lists
ALL_KINDS = ("loaded", *FIT_KINDS)
ALSO_ALLOWED = {"resized": "inflated"}  # an inflated tensor has another shape, too


@dataclass(frozen=True)
class Terms:
    """Under which terms weights may be changed to fit.

    Args:
        allow: kinds that may occur beside `loaded`, as a user has written them.
        rule: how a 2D kernel is spread over depth, `mean` or `centre`.
        what: beginning of error lines, e.g. `train.init`.
        remedy: text about how kinds are allowed; {kinds} stands for their list.
    """

    allow: tuple[str, ...] = ()
    rule: str = "mean"
    what: str = "train.init"
    remedy: str = "set train.init_allow=[{kinds}]"


@dataclass(frozen=True)
class Fate:
    """What became of one tensor.

    Args:
        kind: one of `ALL_KINDS`.
        how: what was changed, e.g. `1x14x14 to 3x14x14 patches`; empty where nothing was.
    """

    kind: str
    how: str = ""


@dataclass(frozen=True)
class Report:
    """What became of each tensor.

    Args:
        fates: by parameter name.
        weights: where the tensors come from.
    """

    fates: dict[str, Fate]
    weights: SourceWeights

    def names(self, kind: str) -> tuple[str, ...]:
        """The names of one kind, sorted."""
        return tuple(sorted(name for name, fate in self.fates.items() if fate.kind == kind))

    def lines(self) -> list[str]:
        """A line about the source, a line per kind that occurs, and the table."""
        weights = self.weights
        lines = [f"starting from {weights.source}: {len(self.names('loaded'))} parameters loaded"]
        if not weights.is_own:
            lines.append(f"  names      {weights.dialect}{_shape_text(weights)}")
        if weights.set_aside:
            parts = ", ".join(f"{name} ({num})" for name, num in weights.set_aside.items())
            lines.append(f"  not read   other parts of the file, by number of tensors: {parts}")
        for kind in FIT_KINDS:
            names = self.names(kind)
            if names:
                some = [self._described(name) for name in names[:MOST_NAMES]]
                more = ", ..." if len(names) > MOST_NAMES else ""
                lines.append(f"  {kind:<10} {len(names)}: {', '.join(some)}{more}")
        if weights.grid is None and POSITIONS in self.names("loaded"):
            lines.append(
                "  note       no file states the window that the positions were learned for"
            )
            lines.append("             it is taken to be that of this model")
        return lines + self.table()

    def table(self) -> list[str]:
        """Numbers of tensors by group and kind, one line per group."""
        groups: dict[str, dict[str, int]] = {}
        for name, fate in self.fates.items():
            counts = groups.setdefault(group_of(name), dict.fromkeys(ALL_KINDS, 0))
            counts[fate.kind] += 1
        width = max(len("group"), *(len(group) for group in groups))
        lines = [f"  {'group':<{width}}" + "".join(f" {kind:>10}" for kind in ALL_KINDS)]
        for group, counts in groups.items():
            cells = "".join(f" {counts[kind] or '-':>10}" for kind in ALL_KINDS)
            lines.append(f"  {group:<{width}}{cells}")
        return lines

    def summary(self) -> dict[str, object]:
        """The report as JSON values: the number of loaded tensors, and the names of the others."""
        others = {kind: list(self.names(kind)) for kind in FIT_KINDS if self.names(kind)}
        return {"loaded": len(self.names("loaded")), **others}

    def _described(self, name: str) -> str:
        how = self.fates[name].how
        return f"{name} ({how})" if how else name


def group_of(name: str) -> str:
    """The row of the table that a parameter belongs to: blocks.*.attn, patch_embed, ..."""
    name = re.sub(r"^blocks\.\d+\.", "blocks.*.", name)
    return re.sub(r"\.(weight|bias|gamma)$", "", name)


@torch.no_grad()
def fit(
    weights: SourceWeights, backbone: Backbone, terms: Terms
) -> tuple[Report, dict[str, Tensor]]:
    """What becomes of each parameter, and the tensors in the shapes of the backbone.

    Args:
        weights: read from disk.
        backbone: gives names, shapes and the grid of its positions; it may have no values.
        terms: what may be changed.
    Returns:
        The report, and a tensor for every parameter that gets one.
    Raises:
        UserError: no parameter is there, a kind occurs that is not allowed, or a shape cannot be
            brought to fit.
    """
    _check_heads(weights, backbone, terms)
    wanted = {name: tuple(value.shape) for name, value in backbone.state_dict().items()}
    full: dict[str, Tensor] = {}
    fates: dict[str, Fate] = {}
    unfit = []
    for name, shape in wanted.items():
        if name not in weights.tensors:
            fates[name] = Fate("missing")
            continue
        value = weights.tensors[name]
        if not is_weight(value):
            unfit.append(f"{name} is {value.dtype} there, as in quantised files")
            continue
        value, fate = _fitted(name, weights, backbone, shape, terms.rule)
        if tuple(value.shape) != shape:
            there = tuple(weights.tensors[name].shape)
            unfit.append(f"{name} is {there} there and {shape} here")
        full[name], fates[name] = value, fate
    if unfit:
        raise SharedError(
            f"{terms.what}: {weights.source} does not fit this model: {sorted(unfit)[0]}"
        )
    if not full:
        raise SharedError(nothing_fits(weights, wanted, terms.what))
    _fill_scales(full, fates, wanted)
    for name in sorted(weights.tensors.keys() - wanted.keys()):
        fates[name] = Fate("unexpected")
    report = Report(fates, weights)
    _check_allowed(report, terms)
    return report, full


def _check_heads(weights: SourceWeights, backbone: Backbone, terms: Terms) -> None:
    """Raise SharedError where the source has another number of heads: all shapes would fit, and
    attention would compute something else.
    """
    heads = getattr(getattr(backbone, "config", None), "heads", None)
    if isinstance(heads, int) and weights.heads not in (None, heads):
        raise SharedError(
            f"{terms.what}: {weights.source} was trained with {counted(weights.heads or 0, 'head')}"
            f" and this model has {heads}; set model.heads={weights.heads}"
        )


def is_weight(value: Tensor) -> bool:
    """Whether a tensor holds plain numbers; those of quantised files need a scale beside them."""
    is_quantised = value.is_quantized or value.element_size() < 2
    return value.dtype == torch.bool or not is_quantised


def _fitted(
    name: str, weights: SourceWeights, backbone: Backbone, shape: tuple[int, ...], rule: str
) -> tuple[Tensor, Fate]:
    """A tensor of the source in the shape of the backbone, as far as that is possible."""
    value = weights.tensors[name]
    if tuple(value.shape) == shape and not (name == POSITIONS and weights.grid is not None):
        return value, Fate("loaded")
    if name == KERNEL and value.ndim in (4, 5) and len(shape) == 5:
        return fitted_kernel(value, (shape[2], shape[3], shape[4]), shape[1], rule)
    if name == POSITIONS and weights.grid is not None and backbone.position_grid is not None:
        return fitted_positions(value, weights.grid, backbone)
    return value, Fate("loaded")


def fitted_kernel(kernel: Tensor, patch: Size3, channels: int, rule: str) -> tuple[Tensor, Fate]:
    """The kernel of the patch embedding for another patch and for one channel.

    Args:
        kernel: (D, C, Y, X) or (D, C, Z, Y, X).
        patch: voxels (z, y, x) of the patches of the backbone.
        channels: channels of its voxels.
        rule: how a kernel of one slice is spread over depth.
    """
    steps, kind = [], "loaded"
    if kernel.ndim == 4:
        kernel = kernel.unsqueeze(2)
    before: Size3 = (int(kernel.shape[2]), int(kernel.shape[3]), int(kernel.shape[4]))
    depth = before[0]
    if depth == 1 < patch[0]:
        patch_in_plane: Size3 = (1, patch[1], patch[2])
    else:
        patch_in_plane = patch
    if before != patch_in_plane:
        kernel = inflate.resize_kernel(kernel, patch_in_plane)
        steps.append(f"patch {times(before)} to {times(patch_in_plane)}")
        kind = "resized"
    if kernel.shape[1] > 1 and channels == 1:
        steps.append(f"sum of {kernel.shape[1]} channels")
        kernel, kind = inflate.one_channel(kernel), "inflated"
    if depth == 1 < patch[0]:
        kernel, kind = inflate.spread_kernel(kernel, patch[0], rule), "inflated"
        steps.append(f"depth 1 to {patch[0]} by {rule}")
    return kernel, Fate(kind, ", ".join(steps))


def fitted_positions(pos_1ND: Tensor, native: Grid, backbone: Backbone) -> tuple[Tensor, Fate]:
    """Positions for the grid of the backbone; the class token's own stays.

    Args:
        pos_1ND: one row for the class token, and one per patch of the native grid.
        native: patches that they were learned for.
        backbone: gives its grid, and resizes as it does in its forward pass.
    """
    grid = backbone.position_grid
    assert grid is not None
    if grid == native:
        return pos_1ND, Fate("loaded")
    pos_ND, kind = pos_1ND[0, 1:], "resized"
    middle = native
    if native[0] == 1 < grid[0]:
        middle, kind = (grid[0], native[1], native[2]), "inflated"
        pos_ND = inflate.repeat_positions(pos_ND, native, grid[0])
    patches_ND = backbone.resized_positions(pos_ND, middle, grid)
    how = f"{times(native)} to {times(grid)} patches"
    return torch.cat([pos_1ND[:, :1].to(patches_ND.dtype), patches_ND[None]], dim=1), Fate(
        kind, how
    )


def _fill_scales(
    full: dict[str, Tensor], fates: dict[str, Fate], wanted: dict[str, tuple[int, ...]]
) -> None:
    """Set LayerScale to 1 where the source has none at all: a network without it is one with 1, and
    the small initial gains would switch its blocks off.
    """
    scales = [name for name in wanted if name.endswith(".gamma")]
    if any(name in full for name in scales):
        return
    for name in scales:
        full[name] = torch.ones(wanted[name])
        fates[name] = Fate("missing", "set to 1")


def _check_allowed(report: Report, terms: Terms) -> None:
    """Raise SharedError where kinds occur that the terms do not allow; the line names all of
    them.
    """
    parts: list[str] = []
    kinds = list(terms.allow)
    allowed = {*kinds, *(ALSO_ALLOWED[kind] for kind in kinds if kind in ALSO_ALLOWED)}
    for kind in FIT_KINDS:
        names = report.names(kind)
        if not names or kind in allowed:
            continue
        how = report.fates[names[0]].how
        num = str(len(names))
        if not parts:
            num = f"{counted(len(names), 'parameter')} of {report.weights.source}"
        example = f"{names[0]} ({how})" if how else names[0]
        parts.append(f"{num} {'is' if len(names) == 1 else 'are'} {kind}, e.g. {example}")
        kinds.append(kind)
    if parts:
        remedy = terms.remedy.format(kinds=",".join(kinds))
        raise SharedError(f"{terms.what}: {'; '.join(parts)}; if that is intended, {remedy}")


def nothing_fits(weights: SourceWeights, wanted: Collection[str], what: str) -> str:
    """The line about a file that has no parameter of the model, with the first names on both sides.

    Args:
        weights: content of the file.
        wanted: names of the model's parameters.
        what: beginning of the line.
    """
    return (
        f"{what}: none of the {len(weights.tensors)} tensors of {weights.source} has the name "
        f"of a parameter of this model; the file has {_first(sorted(weights.tensors))}; the model "
        f"has {_first(sorted(wanted))}. Rename the tensors, or give other weights"
    )


def _first(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")


def _shape_text(weights: SourceWeights) -> str:
    """Patch, channels and positions of a source, for the line about its names."""
    layout = weights.layout
    if layout is None:
        return ""
    text = f"; {'2D' if layout.is_2d else '3D'}, patch {times(layout.patch)}"
    text += f", {layout.channels} channels" if layout.channels > 1 else ", 1 channel"
    if weights.grid is not None:
        text += f", positions for {times(weights.grid)} patches"
    return text
