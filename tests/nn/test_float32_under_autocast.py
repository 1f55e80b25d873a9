"""What is documented as float32 is float32 in a bf16 step, in its type and in its value.

With `train.precision: bf16` the step runs under autocast, which computes every matrix product in
bf16 unless it is switched off. Each entry below is computed with and without autocast from the same
inputs. A value that went through bf16 differs by about 2^-9; the two may differ by 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tapct.losses import gram
from tapct.losses.koleo import koleo
from tapct.models import vit
from tapct.nn import heads, rope
from tapct.nn.norm import LayerNorm
from tapct.nn.posembed import resize_positions
from tapct.nn.prototype_loss import prototype_loss
from tapct.nn.prototypes import TargetConfig, Targets
from tapct.types import Masks, Tokens, TokenSets

NATIVE, LOCAL = (3, 6, 6), (3, 4, 4)  # patches of the crops that positions are learned for
SPACING_MM = torch.tensor([[2.5, 0.7, 0.7], [1.0, 0.9, 0.9]])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model() -> vit.VisionTransformer:
    return vit.build(
        vit.Config(window=(6, 24, 24), patch=(2, 4, 4), dim=24, depth=1, heads=2, drop_path=0.0)
    ).eval()


def units(*shape: int, seed: int) -> Tensor:
    return F.normalize(normal(*shape, seed=seed), dim=-1)


def positions_of_local_crops() -> Tensor:
    return resize_positions(normal(108, 24), NATIVE, LOCAL)


def positions_of_local_crops_as_in_dinov2() -> Tensor:
    return resize_positions(normal(108, 24), NATIVE, LOCAL, "linear", 0.1)


def rotation_of_local_crops() -> Tensor:
    config = rope.Config(coordinates="mm")
    rotation = rope.group_rotation(
        config, 12, grid=LOCAL, patch=(2, 4, 4), num_crops=2, num_prefix=3,
        spacing_mm_B3=SPACING_MM, scale_B3=None, device=torch.device("cpu"),
    )  # fmt: skip
    return rotation.turn(normal(102, 2, 12))


def layer_norm() -> Tensor:
    return LayerNorm(24)(normal(7, 24) + 30)


def features_of_a_head() -> Tensor:
    head = heads.PrototypeHead(24, heads.Config(num_prototypes=9, hidden=16, bottleneck=8))
    head.mlp = torch.nn.Sequential()  # its products are in bf16; the sphere is not
    return head.features(normal(7, 24))


def prototypes_of_a_head() -> Tensor:
    head = heads.PrototypeHead(24, heads.Config(num_prototypes=9, hidden=16, bottleneck=8))
    torch.nn.init.normal_(head.last_layer.weight_g, generator=torch.Generator().manual_seed(1))
    return head.prototypes()


def centre(valid_B: Tensor | None = None) -> Tensor:
    targets = Targets(64, TargetConfig())
    common = normal(16, seed=3)  # features with a common part, so that the mean is no noise
    features_GBW = F.normalize(normal(2, 40, 16, seed=1) + common, dim=-1)
    targets.scores(features_GBW, units(64, 16, seed=2), 0.05, valid_B)
    targets.finish_step(torch.tensor(True))
    return targets.centre_K


def centre_of_masked_patches() -> Tensor:
    return centre(torch.arange(40) % 3 > 0)


def koleo_of_class_tokens() -> Tensor:
    return koleo(normal(12, 24) + 3)


def gram_of_patches() -> Tensor:
    grid, none = (1, 4, 5), torch.zeros(2, 1, 20, dtype=torch.bool)

    def tokens(seed: int) -> Tokens:
        return Tokens(
            normal(2, 24),
            normal(2, 0, 24),
            normal(2, 20, 24) + 0.01 * normal(2, 20, 24, seed=seed),
            grid,
        )

    sets = TokenSets(
        student_global=tokens(1), student_local=None, teacher_global=tokens(2),
        masks=Masks(none, torch.zeros(0, dtype=torch.int64), torch.zeros(0)),
        num_globals=2, num_locals=0, teacher_temp=0.05, snapshot_global=tokens(3),
    )  # fmt: skip
    (term,) = gram.build(gram.Config(start=0)).forward(sets).terms
    return term.value


FLOAT32: list[Callable[[], Tensor]] = [
    positions_of_local_crops,
    positions_of_local_crops_as_in_dinov2,
    rotation_of_local_crops,
    layer_norm,
    features_of_a_head,
    prototypes_of_a_head,
    centre,
    centre_of_masked_patches,
    koleo_of_class_tokens,
    gram_of_patches,
]


@pytest.mark.parametrize("compute", FLOAT32, ids=lambda compute: compute.__name__)
def test_is_float32_under_autocast(compute: Callable[[], Tensor]) -> None:
    plain = compute().detach()
    with torch.autocast("cpu", torch.bfloat16):
        narrow = compute().detach()
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, plain, rtol=1e-6, atol=1e-6 * float(plain.abs().max()))


def test_the_residual_stream_is_float32_with_the_positions_added_exactly() -> None:
    backbone = model()
    assert backbone.pos_embed is not None
    positions_ND = resize_positions(backbone.pos_embed[0, 1:], NATIVE, LOCAL)
    crops = [normal(2, 6, 24, 24), normal(2, 6, 16, 16)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        patches_BND = backbone.patch_embed(crops)[1]
        packed_TD, spans = backbone._embed(crops, [None, None], [NATIVE, LOCAL])
        tokens = backbone(crops)
    assert patches_BND.dtype == torch.bfloat16
    assert packed_TD.dtype == torch.float32
    local_BSD = packed_TD[spans[0].rows :].unflatten(0, (2, -1))
    added_BND = local_BSD[:, 1 + backbone.config.registers :] - patches_BND.float()
    torch.testing.assert_close(added_BND, positions_ND.expand(2, -1, -1), rtol=0, atol=1e-6)
    for group in tokens:
        for part in (group.cls_BD, group.registers_BRD, group.patches_BND):
            assert part.dtype == torch.float32


@pytest.mark.parametrize("kind", ["centring", "sinkhorn"])
def test_sums_over_prototypes_lose_no_mass_under_autocast(kind: str) -> None:
    # the products of features and prototypes are in bf16; what is summed over them is not
    targets = Targets(512, TargetConfig(kind))
    student_VBW = units(2, 40, 16, seed=5).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        scores = targets.scores(units(2, 40, 16, seed=1), units(512, 16, seed=2), 0.05)
        loss = prototype_loss(
            student_VBW,
            units(512, 16, seed=4),
            torch.full((2, 40), 1 / 80),
            scores,
            0.1,
            cross=True,
        )
    assert scores.features_GBW.dtype == torch.bfloat16
    found = (scores.bias_K, loss.value, loss.ce_VB, loss.sums.mass_K, loss.sums.entropy)
    assert all(each.dtype == torch.float32 for each in found)
    assert float(loss.sums.mass_K.sum()) == pytest.approx(80, rel=1e-5)
    assert float(loss.value) == pytest.approx(float(loss.ce_VB.mean()), rel=1e-6)
