"""The vision transformer with rotary positions, and with normed queries and keys."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from tapct.base.exits import UserError
from tapct.models import vit
from tapct.nn import rope
from tapct.nn.layers import DropKey
from tapct.types import Tokens

LEARNED = vit.Config(
    window=(4, 16, 24),
    patch=(2, 8, 8),
    dim=28,
    depth=2,
    heads=2,
    registers=3,
    layer_scale=1.0,
    drop_path=0.0,
)
ROPE = dataclasses.replace(LEARNED, positions="rope")
MM = dataclasses.replace(ROPE, rope=rope.Config(coordinates="mm"))
SIZES = ((3, 4, 16, 24), (2, 4, 24, 16))


def fresh(config: vit.Config = ROPE) -> vit.VisionTransformer:
    model = vit.build(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def groups() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(*size, generator=generator) for size in SIZES]


def flat(results: list[Tokens]) -> Tensor:
    return torch.cat(
        [part.flatten() for t in results for part in (t.cls_BD, t.registers_BRD, t.patches_BND)]
    )


def encode_slowly(model: vit.VisionTransformer, crop: Tensor, spacing_mm: Tensor) -> Tensor:
    """One crop through the whole model in float64, its heads turned one complex pair at a time."""
    config = model.config
    p = {name: value.detach().double() for name, value in model.named_parameters()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    weight, bias = p["patch_embed.proj.weight"], p["patch_embed.proj.bias"]
    patches = F.conv3d(crop.double()[None, None], weight, bias, stride=config.patch)[0]
    grid = torch.tensor(patches.shape[1:])
    index_N3 = torch.cartesian_prod(*(torch.arange(n) for n in patches.shape[1:])).double()
    place_N3 = 2 * (index_N3 + 0.5) / grid - 1
    shortest = 1.0
    if config.rope.coordinates == "mm":
        size = grid * torch.tensor(config.patch) * spacing_mm.double()
        place_N3, shortest = place_N3 * size / 2, 32.0
    width = config.dim // config.heads
    pairs = width // 6
    period_P = shortest * config.rope.base ** (torch.arange(pairs).double() / pairs)
    angle_NR = (2 * math.pi * place_N3[..., None] / period_P).flatten(1)
    prefix = 1 + config.registers
    phase = torch.polar(
        torch.ones(()).double(), torch.cat([torch.zeros(prefix, 3 * pairs).double(), angle_NR])
    )

    def turn(x: Tensor) -> Tensor:
        pair = torch.complex(x[:, : 3 * pairs], x[:, 3 * pairs : 6 * pairs]) * phase
        return torch.cat([pair.real, pair.imag, x[:, 6 * pairs :]], dim=1)

    tokens = torch.cat([p["cls_token"][0], p["register_tokens"][0], patches.flatten(1).T])
    for i in range(config.depth):
        q, k, v = linear(norm(tokens, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, dim=1)
        mixed = []
        for h in range(config.heads):
            part = slice(h * width, (h + 1) * width)
            own_q, own_k = q[:, part], k[:, part]
            if config.qk_norm:
                own_q, own_k = (
                    norm(own_q, f"blocks.{i}.attn.q_norm"),
                    norm(own_k, f"blocks.{i}.attn.k_norm"),
                )
            mixed.append((turn(own_q) @ turn(own_k).T / math.sqrt(width)).softmax(1) @ v[:, part])
        tokens = tokens + p[f"blocks.{i}.ls1.gamma"] * linear(
            torch.cat(mixed, 1), f"blocks.{i}.attn.proj"
        )
        hidden = F.gelu(linear(norm(tokens, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        tokens = tokens + p[f"blocks.{i}.ls2.gamma"] * linear(hidden, f"blocks.{i}.mlp.fc2")
    return norm(tokens, "norm")


@pytest.mark.parametrize(
    "config", [ROPE, MM, dataclasses.replace(MM, qk_norm=True)], ids=["rope", "mm", "mm, normed"]
)
def test_packed_groups_equal_one_crop_at_a_time_written_out(config: vit.Config) -> None:
    model, crops = fresh(config), groups()
    spacing = [
        torch.rand(len(group), 3, generator=torch.Generator().manual_seed(2)) * 3 + 0.5
        for group in crops
    ]
    for group, mm, tokens in zip(crops, spacing, model(crops, spacing_mm=spacing), strict=True):
        for b, crop in enumerate(group):
            got = torch.cat(
                [tokens.cls_BD[b, None], tokens.registers_BRD[b], tokens.patches_BND[b]]
            )
            torch.testing.assert_close(
                got.double(), encode_slowly(model, crop, mm[b]), rtol=1e-3, atol=1e-3
            )


def test_learned_positions_have_the_parameters_and_values_that_they_had() -> None:
    names = {name for name, _ in vit.build(LEARNED).named_parameters()}
    assert "pos_embed" in names and not any("q_norm" in name or "rope" in name for name in names)
    assert set(vit.build(LEARNED).state_dict()) == names
    both = vit.build(dataclasses.replace(LEARNED, positions="both"))
    for name, value in vit.build(LEARNED).named_parameters():
        assert torch.equal(value, both.get_parameter(name))


def test_rotary_positions_alone_have_no_position_parameters_and_a_cls_token_that_starts_wide() -> (
    None
):
    with_learned, alone = vit.build(LEARNED), vit.build(ROPE)
    names = {name for name, _ in with_learned.named_parameters()}
    assert names - {name for name, _ in alone.named_parameters()} == {"pos_embed"}
    counts = [sum(p.numel() for p in model.parameters()) for model in (with_learned, alone)]
    assert counts[0] - counts[1] == (1 + 2 * 2 * 3) * 28
    assert float(alone.cls_token.detach().std()) == pytest.approx(0.02, rel=0.5)
    assert float(with_learned.cls_token.detach().std()) < 1e-5
    assert not list(alone.buffers())


@pytest.mark.parametrize("positions", ["rope", "both"])
def test_shuffled_patches_are_distinguished(positions: str) -> None:
    """Without places, attention would not care for the order of the patches."""
    model = fresh(dataclasses.replace(LEARNED, positions=positions))
    (crop, _) = groups()
    moved = (
        crop.flip(3).unflatten(3, (3, 8)).flip(4).flatten(3)
    )  # the order of patches along x, not what they hold
    assert not torch.allclose(model([crop])[0].cls_BD, model([moved])[0].cls_BD, atol=1e-3)


def test_dropped_crops_take_the_rotation_of_the_kept_ones() -> None:
    """A crop that went through a branch among others has the residual that it has alone, in mm of
    its own.
    """
    model = fresh(dataclasses.replace(MM, depth=1, drop_path=0.5)).double().train()
    group = torch.randn(4, 4, 16, 24, dtype=torch.float64)
    spacing = torch.tensor([[1.0, 1, 1], [2, 1, 1], [1, 3, 1], [1, 1, 4]])
    captured: dict[str, Any] = {}
    block: Any = model.blocks[0]
    block.register_forward_hook(
        lambda _, inputs, output: captured.update(inputs=inputs, output=output)
    )
    model([group], None, DropKey(0, 2), [spacing])
    x, spans, (attend, feed), rotation = captured["inputs"]
    whole = block.ls1(block.attn(block.norm1(x), spans, rotation))
    keep = torch.zeros(len(x), 1, dtype=torch.float64)
    keep[attend.row_S] = 2.0
    x = x + keep * whole
    keep = torch.zeros(len(x), 1, dtype=torch.float64)
    keep[feed.row_S] = 2.0
    torch.testing.assert_close(captured["output"], x + keep * block.ls2(block.mlp(block.norm2(x))))


def test_coordinates_are_drawn_in_training_alone_and_by_key() -> None:
    model = fresh(dataclasses.replace(ROPE, rope=rope.Config(jitter=1.5, rescale=2.0))).train()
    plain = flat(model(groups()))
    drawn = [flat(model(groups(), None, DropKey(0, step))) for step in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[0], drawn[2], atol=1e-4)
    assert not torch.allclose(drawn[0], plain, atol=1e-4)
    assert torch.equal(flat(model.eval()(groups(), None, DropKey(0, 0))), plain)


def test_only_places_in_mm_need_the_spacing() -> None:
    assert (
        not vit.build(LEARNED).needs_spacing
        and not vit.build(ROPE).needs_spacing
        and vit.build(MM).needs_spacing
    )
    with pytest.raises(UserError, match="coordinates=mm: the spacing of these crops was not given"):
        vit.build(MM)(groups())
    given_mm = [torch.full((len(group), 3), 2.0) for group in groups()]
    model = fresh(ROPE)
    assert torch.equal(flat(model(groups(), spacing_mm=given_mm)), flat(model(groups())))
    in_mm = fresh(MM)
    half = [mm / 2 for mm in given_mm]
    assert not torch.allclose(
        flat(in_mm(groups(), spacing_mm=given_mm)),
        flat(in_mm(groups(), spacing_mm=half)),
        atol=1e-3,
    )


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(UserError, match="model.rope is set, but model.positions=learned"):
        dataclasses.replace(LEARNED, rope=rope.Config(base=50.0))
    with pytest.raises(
        UserError, match="heads of at least 6 channels, and model.dim 28 over model.heads 7 gives 4"
    ):
        dataclasses.replace(ROPE, heads=7)


@pytest.mark.parametrize("precision", ["fp32", "bf16 autocast", "bf16"])
def test_every_parameter_has_a_gradient_in_every_precision(precision: str) -> None:
    model = fresh(dataclasses.replace(MM, qk_norm=True, drop_path=0.3))
    model = model.bfloat16() if precision == "bf16" else model
    streams: list[torch.dtype] = []
    model.norm.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0].dtype))
    masks = [torch.rand(len(group), 12) < 0.4 for group in groups()]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16 autocast"):
        results = model(
            groups(), masks, DropKey(0, 0), [torch.ones(len(group), 3) for group in groups()]
        )
    assert streams == [torch.float32]
    weights = torch.linspace(-1, 1, flat(results).numel())
    (flat(results).float() * weights).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_it_is_sharded_on_meta_and_filled_as_a_run_does(tmp_path: Any) -> None:
    """One rank: to_empty after fully_shard loses nothing that init_weights does not set."""
    config = dataclasses.replace(MM, qk_norm=True)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        with torch.device("meta"):
            model = vit.build(config)
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        model.to_empty(device="cpu")
        model.init_weights(0)
        spacing = [torch.ones(len(group), 3) for group in groups()]
        got = flat(model(groups(), spacing_mm=spacing))
        torch.testing.assert_close(got, flat(vit.build(config)(groups(), spacing_mm=spacing)))
    finally:
        torch.distributed.destroy_process_group()
