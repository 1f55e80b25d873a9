"""2D kernels and positions in 3D: what a 2D network, written out without tapct, answers to a slice,
the inflated network answers to a patch that is constant along z.
"""

from __future__ import annotations

from pathlib import Path

import foreign_weights as foreign
import pytest
import torch
import torch.nn.functional as F
from weights_parity import file_of, image

import tapct
from tapct.base.exits import UserError
from tapct.weights import inflate

RGB = foreign.dinov2()


@pytest.mark.parametrize("rule", ["mean", "centre"])
@pytest.mark.parametrize("depth", [4, 5, 6])
def test_the_inflated_network_equals_the_2d_one_on_an_input_constant_along_z(
    rule: str, depth: int, tmp_path: Path
) -> None:
    """For one layer of patches, at the native size and at another one."""
    words = [f"model.patch=[{depth},14,14]", f"model.window=[{depth},56,56]"]
    allow = "inflated"
    loaded = tapct.load_pretrained(file_of(RGB)(tmp_path), words, allow=allow, inflate=rule)
    for size, resize in ((56, 56), {}), ((28, 70), {"native": (4, 4), "scale_offset": 0.1}):
        slices = image(*size)
        cls_BD, patches_BND = foreign.encode(RGB, slices.expand(-1, 3, -1, -1), **resize)
        with torch.no_grad():
            tokens = loaded(slices.expand(-1, depth, -1, -1))
        assert tokens.grid == (1, size[0] // 14, size[1] // 14)
        assert float((tokens.patches_BND - patches_BND).abs().max()) < 1e-5
        assert float((tokens.cls_BD - cls_BD).abs().max()) < 1e-5


def test_a_deeper_window_repeats_the_positions_and_still_equals_2d_on_one_layer(
    tmp_path: Path,
) -> None:
    words = ["model.patch=[4,14,14]", "model.window=[12,56,56]", "preprocess.window=[4,56,56]",
             "preprocess.stride=[4,28,28]"]  # fmt: skip
    loaded = tapct.load_pretrained(file_of(RGB)(tmp_path), words, allow="inflated")
    pos = loaded.model.pos_embed
    assert torch.equal(pos[0, 1:].view(3, 16, -1), RGB["pos_embed"][0, 1:].expand(3, -1, -1))
    slices = image(56, 56)
    cls_BD, patches_BND = foreign.encode(RGB, slices.expand(-1, 3, -1, -1))
    with torch.no_grad():
        tokens = loaded(slices.expand(-1, 4, -1, -1))
    assert float((tokens.patches_BND - patches_BND).abs().max()) < 1e-5
    assert float((tokens.cls_BD - cls_BD).abs().max()) < 1e-5


def test_the_two_rules_differ_on_an_input_that_varies_along_z() -> None:
    kernel = torch.randn(8, 1, 1, 4, 4)
    mean, centre = (inflate.spread_kernel(kernel, 4, rule) for rule in ("mean", "centre"))
    patch = torch.randn(1, 1, 4, 4, 4)
    want_mean = F.conv2d(patch.mean(2), kernel[:, :, 0]).flatten()
    want_centre = F.conv2d(patch[:, :, 2], kernel[:, :, 0]).flatten()
    torch.testing.assert_close(F.conv3d(patch, mean).flatten(), want_mean)
    torch.testing.assert_close(F.conv3d(patch, centre).flatten(), want_centre)


@pytest.mark.parametrize(
    ("old", "new"), [((14, 14), (16, 16)), ((8, 8), (16, 24)), ((5, 7), (9, 7))]
)
def test_a_larger_kernel_answers_to_a_resized_patch_as_before(
    old: tuple[int, int], new: tuple[int, int]
) -> None:
    kernel = torch.randn(6, 3, 1, *old)
    resized = inflate.resize_kernel(kernel, (1, *new))[:, :, 0]
    patches = torch.randn(10, 3, *old)
    larger = F.interpolate(patches, size=new, mode="bilinear")
    want = torch.einsum("dcyx,ncyx->nd", kernel[:, :, 0], patches)
    got = torch.einsum("dcyx,ncyx->nd", resized, larger)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_smaller_kernel_is_the_least_squares_solution_over_white_patches() -> None:
    """Against torch's solver: the rows of B are the resized unit patches."""
    kernel = torch.randn(3, 1, 1, 14, 14, dtype=torch.float64)
    unit_patches = torch.eye(14 * 14, dtype=torch.float64).view(-1, 1, 14, 14)
    smaller = F.interpolate(unit_patches, size=(8, 8), mode="bilinear").flatten(1)  # (196, 64)
    want = torch.linalg.lstsq(smaller, kernel.flatten(1).T).solution.T
    got = inflate.resize_kernel(kernel, (1, 8, 8)).flatten(1)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_along_z_the_rule_of_patch_sizes_is_the_mean() -> None:
    kernel = torch.randn(3, 2, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(
        inflate.resize_kernel(kernel, (5, 4, 4)), inflate.spread_kernel(kernel, 5, "mean")
    )


def test_an_unknown_rule_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="inflate: middle is none of mean, centre"):
        tapct.load_pretrained(file_of(RGB)(tmp_path), inflate="middle")
