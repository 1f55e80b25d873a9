from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tapct.types import AIR_HU, Batch


def body_phantom(shape_zyx: tuple[int, int, int], seed: int) -> np.ndarray:
    """int16 HU: an ellipse of soft tissue with structure, in noisy air; every scan differs."""
    depth, height, width = shape_zyx
    noise = np.random.default_rng(seed)
    z, y, x = np.meshgrid(
        np.arange(depth), np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij"
    )
    shift = noise.uniform(-0.1, 0.1, 2)
    inside = ((y - shift[0]) / 0.7) ** 2 + ((x - shift[1]) / 0.85) ** 2 < 1
    tissue = 40 + 250 * np.sin(9 * y + z / 3 + seed) * np.cos(7 * x)
    hu = np.where(inside, tissue, -1000) + noise.normal(0, 15, shape_zyx)
    return np.clip(hu, AIR_HU, 3000).astype(np.int16)


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """A batch of phantoms, each of its own size, padded to the largest, sample numbers as given."""

    def make(
        samples: list[int], sizes: list[tuple[int, int, int]] | None = None, depth: int = 16
    ) -> Batch:
        sizes = sizes or [(depth, 48, 56)] * len(samples)
        largest = [
            max(depth, max(s[0] for s in sizes)),
            max(s[1] for s in sizes),
            max(s[2] for s in sizes),
        ]
        hu = torch.full((len(samples), *largest), AIR_HU, dtype=torch.int16)
        for slab, sample, size in zip(hu, samples, sizes, strict=True):
            slab[: size[0], : size[1], : size[2]] = torch.from_numpy(body_phantom(size, sample))
        number = torch.tensor(samples)
        return Batch(
            hu,
            torch.tensor(sizes),
            torch.ones(len(samples), 3),
            number,
            number,
            torch.zeros_like(number),
        )

    return make
