"""Draws docs/pictures/*.png, the pictures of docs/concepts.md, on a phantom scan.

Crops, blur and masks come from the code of training with the settings of configs/tap_s_3d.yaml;
four local views instead of eight are shown, and both global views are masked.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from tapct.config import load_config
from tapct.data.phantom.archive import Config as PhantomConfig
from tapct.data.phantom.archive import make_case
from tapct.run.config import RunConfig
from tapct.ssl.inputs import Inputs
from tapct.types import Batch, Masks, Views
from tapct.views import boxes

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "pictures"
CONFIG = load_config(RunConfig, ROOT / "configs" / "tap_s_3d.yaml", []).value
CONTRACT, PATCH = CONFIG.contract, CONFIG.model.config.patch
VIEWS = dataclasses.replace(CONFIG.views, num_locals=4)
MASKS = dataclasses.replace(CONFIG.masks, probability=1.0)
INPUTS = Inputs(VIEWS, MASKS, CONTRACT, PATCH, seed=13)
SLAB_START, SLAB_DEPTH = 24, 12
# colours that colour-blind readers can distinguish (Okabe and Ito)
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#e69f00", "#009e73", "#8a8a8a"
SOFT_TISSUE = {"cmap": "gray", "vmin": -160.0, "vmax": 240.0}
MAX_COLOURS = 128  # of a picture: grey levels and a few colours, so that files stay small


def example() -> tuple[Batch, Views, Masks]:
    """One slab of a phantom scan, its views and their masks."""
    config = PhantomConfig(slices=(96, 96), in_plane=(256, 256), slice_mm=(3.0, 3.0))
    volume, _, _ = make_case(0, 0, config)
    slab = volume.hu_ZYX[SLAB_START : SLAB_START + SLAB_DEPTH]
    number = torch.tensor([5])
    batch = Batch(
        torch.from_numpy(slab.copy())[None],
        torch.tensor([slab.shape]),
        torch.tensor([volume.spacing_mm]),
        number,
        torch.zeros(1, dtype=torch.int64),
        torch.tensor([SLAB_START]),
    )
    views, drawn = INPUTS.make(batch, [0], INPUTS.mask_counts(0, 1))
    return batch, views, drawn


def hu(view_ZYX: torch.Tensor, z: int = 6) -> np.ndarray:
    """A slice of a normalised view, in HU."""
    return (view_ZYX[z] * CONTRACT.std + CONTRACT.mean).numpy()


def show(axes: Axes, image: np.ndarray, title: str, colour: str = "black") -> None:
    """A slice, with a frame and a title in one colour."""
    axes.imshow(image, **SOFT_TISSUE)
    axes.set_title(title, fontsize=9, color=colour)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(2)


def save(figure: Figure, name: str) -> None:
    """Write a figure as a small PNG with a palette."""
    path = OUT / name
    figure.savefig(path, dpi=110, bbox_inches="tight", facecolor="white")
    pyplot.close(figure)
    with Image.open(path) as image:
        image.convert("RGB").quantize(MAX_COLOURS, dither=Image.Dither.NONE).save(
            path, optimize=True
        )
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


def draw_views(batch: Batch, views: Views) -> None:
    """The slab with the boxes of its crops, and the crops."""
    figure = pyplot.figure(figsize=(9.5, 3.9))
    grid = figure.add_gridspec(2, 5, width_ratios=[2.1, 1, 1, 1, 1], wspace=0.12, hspace=0.25)
    axes = figure.add_subplot(grid[:, 0])
    show(axes, batch.hu_BZYX[0, SLAB_DEPTH // 2].numpy(), "a slice of the slab")
    cells = boxes.body_cells(batch.hu_BZYX, CONTRACT)
    names = []
    for kind, count, colour in (("global", 2, BLUE), ("local", VIEWS.num_locals, ORANGE)):
        crops = boxes.draw(
            VIEWS.rule(kind), kind, count, cells, batch.extent_B3, batch.sample_B, INPUTS.seed
        )
        for number in range(count):
            _, y, x = crops.start_VB3[number, 0].tolist()
            _, height, width = crops.length_VB3[number, 0].tolist()
            name = f"{kind[0].upper()}{number + 1}"
            names.append((name, kind, number, colour))
            axes.add_patch(
                Rectangle((x - 0.5, y - 0.5), width, height, fill=False, ec=colour, lw=1.6)
            )
            axes.text(x + 4, y + height - 5, name, color=colour, fontsize=9, weight="bold")
    places = [grid[0, 1:3], grid[0, 3:5], *(grid[1, column] for column in range(1, 5))]
    for place, (name, kind, number, colour) in zip(places, names):
        view = (views.global_VBZYX if kind == "global" else views.local_VBZYX)[number, 0]
        size = "×".join(str(side) for side in view.shape)
        title = f"{name}: {size}" if kind == "global" else name
        show(figure.add_subplot(place), hu(view), title, colour)
    save(figure, "views.png")


def draw_masks(views: Views, drawn: Masks) -> None:
    """The two global views with the patches that the student does not see."""
    figure, rows = pyplot.subplots(2, 4, figsize=(9.5, 5.0))
    depth = INPUTS.grid[0]
    for view in range(2):
        masked = drawn.masked_VBN[view, 0].reshape(INPUTS.grid).numpy()
        image = views.global_VBZYX[view, 0]
        show(rows[view, 0], hu(image), f"G{view + 1}, as the teacher sees it", BLUE)
        for layer in range(depth):
            middle = layer * PATCH[0] + PATCH[0] // 2
            seen = hu(image, middle).copy()
            hidden = np.kron(masked[layer], np.ones(PATCH[1:])).astype(bool)
            axes = rows[view, layer + 1]
            show(axes, seen, f"student: slices {layer * 4 + 1} to {layer * 4 + 4}", ORANGE)
            overlay = np.zeros((*hidden.shape, 4))
            overlay[hidden] = matplotlib.colors.to_rgba(ORANGE, 0.85)
            axes.imshow(overlay)
        rows[view, 0].set_ylabel(f"{masked.mean():.0%} masked", fontsize=9)
    figure.tight_layout()
    save(figure, "masks.png")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """An arrow from one box to another."""
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "lw": 1.6, "color": colour}
    axes.add_patch(FancyArrowPatch(start, end, **style))


def box(axes: Axes, place: tuple[float, float], text: str, colour: str, width: float = 1.9) -> None:
    """A box with a text in its middle."""
    x, y = place
    axes.add_patch(Rectangle((x, y - 0.36), width, 0.72, fc="white", ec=colour, lw=1.6))
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=8.5)


def draw_losses(views: Views, drawn: Masks) -> None:
    """Which tokens the losses compare."""
    figure, axes = pyplot.subplots(figsize=(9.5, 4.8))
    axes.set_xlim(0, 12)
    axes.set_ylim(0, 6.2)
    axes.axis("off")
    masked = drawn.masked_VBN[1, 0].reshape(INPUTS.grid).numpy()[1]
    hidden = np.kron(masked, np.ones(PATCH[1:])).astype(bool)
    first, second = (hu(views.global_VBZYX[view, 0]) for view in range(2))
    rows = [
        (5.4, first, "G1", "teacher", BLUE, {5.4: "class token"}),
        (3.95, second, "G2", "teacher", BLUE, {3.95: "patch tokens"}),
        (2.5, second, "G2", "student", ORANGE, {2.9: "masked patch tokens", 2.1: "class token"}),
        (0.9, hu(views.local_VBZYX[0, 0]), "L1", "student", ORANGE, {0.9: "class token"}),
    ]
    for y, image, name, network, colour, outputs in rows:
        extent = (0.5, 1.75, y - 0.62, y + 0.62)
        axes.imshow(image, extent=extent, aspect="auto", **SOFT_TISSUE)
        if len(outputs) == 2:
            overlay = np.zeros((*hidden.shape, 4))
            overlay[hidden] = matplotlib.colors.to_rgba(ORANGE, 0.85)
            axes.imshow(overlay, extent=extent, aspect="auto")
        axes.text(0.35, y, name, ha="right", va="center", fontsize=9, color=colour)
        box(axes, (2.5, y), network, colour, 1.5)
        arrow(axes, (1.8, y), (2.5, y), GREY)
        for place, text in outputs.items():
            box(axes, (5.0, place), text, colour, 2.3)
            arrow(axes, (4.0, y), (5.0, place), GREY)
    for y, text in (
        (5.4, "DINO, global"),
        (3.5, "iBOT: the same patch"),
        (2.1, "KoLeo: spread scans"),
        (0.9, "DINO, local"),
    ):
        box(axes, (9.3, y), text, GREEN, 2.6)
    for start, end in ((5.45, 5.5), (3.95, 3.6), (5.25, 1.1)):
        arrow(axes, (7.3, start), (9.3, end), BLUE)
    for start, end in ((2.25, 5.25), (2.9, 3.4), (2.1, 2.1), (0.85, 0.85)):
        arrow(axes, (7.3, start), (9.3, end), ORANGE)
    save(figure, "losses.png")


def entropy(p: np.ndarray) -> np.ndarray:
    """Entropy in nats along the last axis."""
    return -(p * np.log(np.maximum(p, 1e-12))).sum(-1)


def draw_states() -> None:
    """Targets of four scans over eight prototypes: a run that learns, a stuck and a collapsed one.

    The information is the entropy of the mean target minus the mean entropy of the targets.
    """
    logits = np.random.default_rng(4).normal(0, 1, (4, 8))
    peak = np.zeros(8)
    peak[2] = 3.0
    states = {
        "alive: targets differ": logits * 2.2,
        "stuck: every target is uniform": np.zeros((4, 8)),
        "collapsed: one target for all": np.tile(peak, (4, 1)),
    }
    figure, columns = pyplot.subplots(4, 3, figsize=(9.5, 3.6), sharex=True, sharey=True)
    for column, (title, scores) in enumerate(states.items()):
        targets = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        information = entropy(targets.mean(0)) - entropy(targets).mean()
        for scan in range(4):
            axes = columns[scan, column]
            axes.bar(range(1, 9), targets[scan], color=(BLUE, GREY, ORANGE)[column])
            axes.set_ylim(0, 1)
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel(f"scan {scan + 1}", fontsize=8, rotation=0, ha="right", va="center")
        text = f"{title}\ninformation {abs(information):.2f} nats"
        columns[0, column].set_title(text, fontsize=9)
        columns[-1, column].set_xlabel("prototype", fontsize=8)
    save(figure, "states.png")


def main() -> None:
    """Draw all pictures."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    OUT.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    batch, views, drawn = example()
    draw_views(batch, views)
    draw_masks(views, drawn)
    draw_losses(views, drawn)
    draw_states()


if __name__ == "__main__":
    main()
