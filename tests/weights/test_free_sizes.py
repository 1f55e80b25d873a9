"""torch.export of a loaded export leaves the number of crops and their size free."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers_cases import LEARNED, network, settings_of

from tapct.weights.export import save_export
from tapct.weights.pretrained import Pretrained, load_pretrained


class Plain(nn.Module):
    """A backbone that returns plain tensors."""

    def __init__(self, pretrained: Pretrained) -> None:
        super().__init__()
        self.pretrained = pretrained

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.pretrained(crops)
        return tokens.cls_BD, tokens.patches_BND


def test_batch_depth_height_and_width_are_free(tmp_path: Path) -> None:
    save_export(tmp_path / "export", network(LEARNED), settings_of(LEARNED), {})
    plain = Plain(load_pretrained(tmp_path / "export"))
    free = {0: Dim("b", max=64)}
    for axis, side in enumerate(LEARNED.patch):
        free[1 + axis] = side * Dim(f"n{axis}", min=2, max=64)
    # traced at the native size, where an eager call does not resize the positions
    program = torch.export.export(plain, (torch.randn(3, 4, 16, 24),), dynamic_shapes=(free,))
    for shape in ((3, 4, 16, 24), (1, 10, 16, 24), (2, 4, 32, 8), (5, 6, 8, 40)):
        crops = torch.randn(shape)
        for found, want in zip(program.module()(crops), plain(crops), strict=True):
            torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
