"""The vision transformer: packing, tokens, positions, names, sizes, initial values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tapct.base.exits import UserError
from tapct.models import vit
from tapct.nn import rope
from tapct.nn.layers import DropKey
from tapct.nn.posembed import resize_positions
from tapct.types import Tokens

TINY = vit.Config(
    window=(4, 16, 24),
    patch=(2, 8, 8),
    dim=16,
    depth=2,
    heads=2,
    registers=3,
    layer_scale=1.0,
    drop_path=0.0,
)


def fresh(config: vit.Config = TINY, seed: int = 1) -> vit.VisionTransformer:
    """A model whose every parameter matters: no zeros, no 1e-6."""
    model = vit.build(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def crops(*sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(*size, generator=generator) for size in sizes]


def all_tokens(tokens: Tokens) -> Tensor:
    return torch.cat([tokens.cls_BD[:, None], tokens.registers_BRD, tokens.patches_BND], dim=1)


def encode_slowly(model: vit.VisionTransformer, crop: Tensor, mask_N: Tensor | None) -> Tensor:
    """One crop (Z, Y, X) through the whole model in float64, from the formulas: (1 + R + N, D)."""
    config = model.config
    p = {name: value.detach().double() for name, value in model.named_parameters()}

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        return (
            centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.weight"]
            + p[f"{name}.bias"]
        )

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    patches = F.conv3d(
        crop.double()[None, None],
        p["patch_embed.proj.weight"],
        p["patch_embed.proj.bias"],
        stride=config.patch,
    )[0]
    grid = tuple(patches.shape[1:])
    rows: list[Tensor] = []
    for z in range(grid[0]):
        for y in range(grid[1]):
            for x in range(grid[2]):
                is_masked = mask_N is not None and bool(mask_N[len(rows)])
                rows.append(p["mask_token"][0] if is_masked else patches[:, z, y, x])
    pos = resize_positions(p["pos_embed"][0, 1:], config.grid, grid)  # type: ignore[arg-type]
    tokens = torch.cat(
        [
            p["cls_token"][0] + p["pos_embed"][0, :1],
            p["register_tokens"][0],
            torch.stack(rows) + pos,
        ]
    )
    for i in range(config.depth):
        q, k, v = linear(norm(tokens, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, dim=1)
        width = config.dim // config.heads
        mixed = []
        for h in range(config.heads):
            part = slice(h * width, (h + 1) * width)
            mixed.append((q[:, part] @ k[:, part].T / math.sqrt(width)).softmax(1) @ v[:, part])
        tokens = tokens + p[f"blocks.{i}.ls1.gamma"] * linear(
            torch.cat(mixed, 1), f"blocks.{i}.attn.proj"
        )
        hidden = F.gelu(linear(norm(tokens, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        tokens = tokens + p[f"blocks.{i}.ls2.gamma"] * linear(hidden, f"blocks.{i}.mlp.fc2")
    return norm(tokens, "norm")


def test_packed_groups_equal_one_crop_at_a_time_written_out() -> None:
    model = fresh()
    groups = crops((3, 4, 16, 24), (2, 4, 24, 16), (4, 2, 8, 8))
    masks = [
        torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) < 0.4,
        None,
        torch.tensor([[True], [False]] * 2),
    ]
    results = model(groups, masks)
    assert [tokens.grid for tokens in results] == [(2, 2, 3), (2, 3, 2), (1, 1, 1)]
    for group, mask, tokens in zip(groups, masks, results, strict=True):
        for b, crop in enumerate(group):
            want = encode_slowly(model, crop, None if mask is None else mask[b])
            torch.testing.assert_close(all_tokens(tokens)[b].double(), want, rtol=1e-4, atol=1e-4)


def test_packed_groups_have_the_gradients_of_separate_passes() -> None:
    model = fresh().double()
    groups = [group.double() for group in crops((3, 4, 16, 24), (4, 2, 8, 8))]
    masks = [torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) < 0.4, None]

    def gradients(passes: list[list[Tokens]]) -> list[Tensor]:
        loss = torch.stack(
            [all_tokens(tokens).sin().sum() for each in passes for tokens in each]
        ).sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    packed = gradients([model(groups, masks)])
    separate = gradients(
        [
            model([g[b : b + 1]], [None if m is None else m[b : b + 1]])
            for g, m in zip(groups, masks)
            for b in range(len(g))
        ]
    )
    for a, b in zip(packed, separate, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_patch_embedding_is_the_convolution_it_is_named_after() -> None:
    for in_chans in (1, 2):
        model = fresh(dataclasses.replace(TINY, in_chans=in_chans))
        (group,) = crops((3, 4, 16, 24) if in_chans == 1 else (3, 2, 4, 16, 24))
        image = group[:, None] if in_chans == 1 else group
        want = model.patch_embed.proj(image).flatten(2).transpose(1, 2)
        torch.testing.assert_close(model.patch_embed([group])[0], want, rtol=1e-4, atol=1e-5)


def embed(model: vit.VisionTransformer, group: Tensor, mask_BN: Tensor | None = None) -> Tensor:
    """Tokens as they enter the first block, (B, 1 + R + N, D)."""
    seen: list[Tensor] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model([group], [mask_BN])
    handle.remove()
    return seen[0].unflatten(0, (group.shape[0], -1))


def test_tokens_are_cls_registers_patches_and_registers_have_no_position() -> None:
    model = fresh()
    (group,) = crops((2, 4, 16, 24))
    tokens = embed(model, group)
    assert tokens.shape == (2, 1 + 3 + 12, 16)
    torch.testing.assert_close(
        tokens[:, 0], (model.cls_token + model.pos_embed[:, :1])[0].expand(2, -1)
    )
    assert model.register_tokens is not None
    torch.testing.assert_close(tokens[:, 1:4], model.register_tokens.expand(2, -1, -1))
    torch.testing.assert_close(
        tokens[:, 4:], model.patch_embed([group])[0] + model.pos_embed[:, 1:]
    )


def test_the_mask_token_takes_the_place_of_patches_before_positions() -> None:
    model = fresh()
    (group,) = crops((2, 4, 16, 24))
    mask_BN = torch.zeros(2, 12, dtype=torch.bool)
    mask_BN[0, 3] = mask_BN[1, 7] = True
    plain, masked = embed(model, group), embed(model, group, mask_BN)
    torch.testing.assert_close(masked[0, 4 + 3], model.mask_token[0] + model.pos_embed[0, 1 + 3])
    torch.testing.assert_close(masked[1, 4 + 7], model.mask_token[0] + model.pos_embed[0, 1 + 7])
    assert ((plain - masked).abs().amax(2) > 0).nonzero().tolist() == [[0, 7], [1, 11]]


def test_a_local_crop_of_the_published_model_has_3x12x12_positions() -> None:
    config = vit.Config(dim=8, heads=1, depth=1)
    model = fresh(config)
    group = torch.zeros(1, 12, 96, 96)
    tokens = embed(model, group)[0, 1 + config.registers :]
    assert model.patch_embed.proj.bias is not None
    pos = tokens - model.patch_embed.proj.bias
    image = model.pos_embed[0, 1:].view(3, 28, 28, 8).permute(0, 3, 1, 2)
    want = F.interpolate(image, size=(12, 12), mode="bicubic").permute(0, 2, 3, 1).reshape(432, 8)
    torch.testing.assert_close(pos, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((2, 4, 15, 24), "crop 4x15x24 is no multiple of the patch 2x8x8 along y"),
        ((2, 3, 16, 24), "3x16x24"),
        ((2, 0, 16, 24), "0x16x24"),
        ((1, 2, 4, 16, 24), r"takes \(B, Z, Y, X\)"),
    ],
)
def test_a_crop_that_does_not_fit_the_patch_is_refused(shape: tuple[int, ...], match: str) -> None:
    with pytest.raises(UserError, match=match):
        vit.build(TINY)([torch.zeros(shape)])


def test_a_window_or_dim_that_does_not_divide_is_refused_with_the_config() -> None:
    with pytest.raises(
        UserError, match="model.window 4x15x24 is no multiple of the patch 2x8x8 along y"
    ):
        dataclasses.replace(TINY, window=(4, 15, 24))
    with pytest.raises(UserError, match="model.dim 16 is no multiple of model.heads 3"):
        dataclasses.replace(TINY, heads=3)


NAMES = [
    *(
        "cls_token",
        "register_tokens",
        "pos_embed",
        "mask_token",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    ),
    *(
        "norm.weight",
        "norm.bias",
        "blocks.0.norm1.weight",
        "blocks.0.norm1.bias",
        "blocks.0.attn.qkv.weight",
    ),
    *(
        "blocks.0.attn.qkv.bias",
        "blocks.0.attn.proj.weight",
        "blocks.0.attn.proj.bias",
        "blocks.0.ls1.gamma",
    ),
    *(
        "blocks.0.norm2.weight",
        "blocks.0.norm2.bias",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc1.bias",
    ),
    *("blocks.0.mlp.fc2.weight", "blocks.0.mlp.fc2.bias", "blocks.0.ls2.gamma"),
]


def test_parameter_names_and_shapes_are_dinov2s() -> None:
    state = vit.build(dataclasses.replace(TINY, depth=1)).state_dict()
    assert sorted(state) == sorted(NAMES)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes["patch_embed.proj.weight"] == (16, 1, 2, 8, 8)
    assert (shapes["cls_token"], shapes["register_tokens"], shapes["mask_token"]) == (
        (1, 1, 16),
        (1, 3, 16),
        (1, 16),
    )
    assert shapes["pos_embed"] == (1, 1 + 12, 16)
    swiglu = vit.build(dataclasses.replace(TINY, depth=1, ffn="swiglu")).state_dict()
    assert {name for name in swiglu if ".mlp." in name} == {
        f"blocks.0.mlp.{layer}.{kind}" for layer in ("w12", "w3") for kind in ("weight", "bias")
    }


S, B = {"dim": 384, "heads": 6}, {"dim": 768, "heads": 12}
VOLUME: dict[str, Any] = {"window": (12, 224, 224), "patch": (4, 8, 8)}
SLAB: dict[str, Any] = {"window": (6, 224, 224), "patch": (6, 16, 16)}
SLICE: dict[str, Any] = {"window": (1, 224, 224), "patch": (1, 16, 16)}


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        # per block 12 D^2 + 15 D with LayerScale; 2 D of the last norm; (7 + N) D of tokens and
        # positions; (P + 1) D
        ({**VOLUME, **B}, 87_083_520),
        ({**VOLUME, **S}, 12 * (12 * 384**2 + 15 * 384) + (2 + 7 + 2352 + 257) * 384),
        ({**SLAB, **S}, 12 * (12 * 384**2 + 15 * 384) + (2 + 7 + 196 + 1537) * 384),
        ({**SLAB, **B}, 12 * (12 * 768**2 + 15 * 768) + (2 + 7 + 196 + 1537) * 768),
        ({**SLICE, **S}, 12 * (12 * 384**2 + 15 * 384) + (2 + 7 + 196 + 257) * 384),
        ({**SLICE, **B}, 12 * (12 * 768**2 + 15 * 768) + (2 + 7 + 196 + 257) * 768),
    ],
)
def test_the_family_has_its_published_and_derived_sizes(sizes: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        model = vit.build(vit.Config(**sizes))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    tokens = model([torch.empty(2, *sizes["window"], device="meta")])[0]
    assert tokens.patches_BND.shape == (2, math.prod(model.config.grid), sizes["dim"])


def test_initial_values_follow_dinov2() -> None:
    model = vit.build(vit.Config(window=(8, 64, 64), dim=192, depth=2, heads=3, layer_scale=1e-5))
    values = dict(model.named_parameters())
    for name in ("pos_embed", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight"):
        assert values[name].std().item() == pytest.approx(0.02, rel=0.05), name
        assert values[name].mean().abs().item() < 1e-3, name
    for name in ("cls_token", "register_tokens"):
        assert 5e-7 < values[name].std().item() < 2e-6, name
    assert values["mask_token"].abs().max() == 0
    assert (values["blocks.1.ls2.gamma"] == 1e-5).all()
    assert (values["norm.weight"] == 1).all() and (values["blocks.0.norm2.weight"] == 1).all()
    assert all(
        (value == 0).all()
        for name, value in values.items()
        if name.endswith("bias") and "patch" not in name
    )
    for name in (
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    ):  # U(-1/16, 1/16) for a patch of 256 voxels
        assert values[name].abs().max().item() <= 1 / 16 and values[
            name
        ].std().item() == pytest.approx(0.0361, rel=0.1)


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    a, b, c = (vit.build(TINY) for _ in range(3))
    for model, seed in ((a, 3), (b, 3), (c, 4)):
        torch.rand(seed)
        model.init_weights(seed)
    one, two, other = a.state_dict(), b.state_dict(), c.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], one["blocks.1.attn.qkv.weight"])
    deeper = vit.build(dataclasses.replace(TINY, depth=3))
    deeper.init_weights(3)
    assert all(torch.equal(value, deeper.state_dict()[name]) for name, value in one.items())


def test_layers_for_layer_decay_count_up_from_the_input() -> None:
    model = vit.build(TINY)
    ids = {name: model.param_group_id(name) for name, _ in model.named_parameters()}
    assert {ids[name] for name in ("cls_token", "register_tokens", "mask_token", "pos_embed")} == {
        0
    }
    assert ids["patch_embed.proj.weight"] == 0 and ids["norm.weight"] == model.num_blocks + 1 == 3
    assert all(
        ids[name] == int(name.split(".")[1]) + 1 for name in ids if name.startswith("blocks.")
    )


def test_without_layer_scale_the_branch_is_added_as_it_is() -> None:
    plain = vit.build(dataclasses.replace(TINY, layer_scale=None))
    assert not any(".ls" in name for name, _ in plain.named_parameters())
    plain.init_weights(1)
    ones = vit.build(TINY)
    ones.init_weights(1)
    groups = crops((2, 4, 16, 24))
    torch.testing.assert_close(all_tokens(plain(groups)[0]), all_tokens(ones(groups)[0]))


def test_dropped_crops_skip_the_branch_and_kept_ones_are_scaled() -> None:
    """One block, drop 0.5 of 4: by the formula, for the subsets that the key draws."""
    config = dataclasses.replace(TINY, depth=1, drop_path=0.5)
    model = fresh(config).double()
    groups = [group.double() for group in crops((4, 4, 16, 24), (6, 2, 8, 8))]
    captured: dict[str, Any] = {}
    block: Any = model.blocks[0]
    block.register_forward_hook(
        lambda _, inputs, output: captured.update(inputs=inputs, output=output)
    )
    model(groups, None, DropKey(0, 5))
    x, spans, (attend, feed), rotation = captured["inputs"]
    assert rotation is None
    assert attend.row_S.tolist() != feed.row_S.tolist()  # each branch has its own draw
    for subset, norm, branch, scale in (
        (attend, block.norm1, lambda y: block.attn(y, spans), block.ls1), (feed, block.norm2,
        block.mlp, block.ls2)
    ):  # fmt: skip
        keep = torch.zeros(len(x), 1, dtype=torch.float64)
        keep[subset.row_S] = 2.0
        x = x + keep * scale(branch(norm(x)))
        assert (
            keep[: spans[0].rows].view(4, -1).sum(0).eq(4).all()
            and keep[spans[0].rows :].view(6, -1).sum(0).eq(6).all()
        )
    torch.testing.assert_close(captured["output"], x)


def test_stochastic_depth_is_off_without_key_in_eval_and_at_rate_zero() -> None:
    model = fresh(dataclasses.replace(TINY, drop_path=0.5))
    groups = crops((4, 4, 16, 24))
    plain = all_tokens(model(groups)[0])
    key = DropKey(0, 0)
    assert not torch.equal(all_tokens(model(groups, None, key)[0]), plain)
    assert torch.equal(
        all_tokens(model(groups, None, key)[0]), all_tokens(model(groups, None, key)[0])
    )
    assert torch.equal(all_tokens(model.eval()(groups, None, key)[0]), plain)
    assert torch.equal(all_tokens(fresh(TINY)(groups, None, key)[0]), plain)


def test_bf16_autocast_runs_end_to_end_with_float32_tokens() -> None:
    model = fresh(dataclasses.replace(TINY, drop_path=0.3, layer_scale=None))
    groups = crops((4, 4, 16, 24), (6, 2, 8, 8))
    masks = [torch.rand(4, 12) < 0.4, None]
    want = model(groups, masks, DropKey(0, 0))
    with torch.autocast("cpu", torch.bfloat16):
        results = model(groups, masks, DropKey(0, 0))
    for tokens, exact in zip(results, want, strict=True):
        assert all_tokens(tokens).dtype == torch.float32
        torch.testing.assert_close(all_tokens(tokens), all_tokens(exact), rtol=0.1, atol=0.15)
    torch.stack([all_tokens(tokens).square().sum() for tokens in results]).sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in model.parameters()
    )


def test_bf16_parameters_leave_the_residual_stream_in_float32() -> None:
    """As under a sharded bf16 policy: products in bf16, norms and the sum over blocks not."""
    model = fresh(dataclasses.replace(TINY, drop_path=0.3)).bfloat16()
    streams: list[torch.dtype] = []
    model.norm.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0].dtype))
    groups = crops((4, 4, 16, 24), (6, 2, 8, 8))
    results = model(groups, [torch.rand(4, 12) < 0.4, None], DropKey(0, 0))
    assert streams == [torch.float32]
    assert all(all_tokens(tokens).isfinite().all() for tokens in results)
    torch.stack([all_tokens(tokens).float().sum() for tokens in results]).sum().backward()


CHANGES: dict[str, Any] = {
    "window": (4, 24, 16), "patch": (2, 8, 4), "in_chans": 2, "dim": 32, "depth": 3, "heads": 4,
    "mlp_ratio": 2.0,
    "ffn": "swiglu", "qkv_bias": False, "registers": 1, "layer_scale": 0.5, "norm_eps": 0.1,
    "drop_path": 0.5,
    "drop_path_rounding": "dinov2", "pos_resize": "linear", "pos_offset": 0.1, "qk_norm": True,
    "positions": "both", "rope": rope.Config(base=50.0),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(vit.Config) if field.name != "attention"]
)
def test_every_field_changes_the_result(name: str) -> None:
    """`attention` chooses among equal results; tests/nn/test_attention.py holds its contract."""
    base = dataclasses.replace(TINY, drop_path=0.1)
    if name == "rope":
        base = dataclasses.replace(
            base, positions="both", dim=32
        )  # two pairs an axis: base turns the second
    before, after = fresh(base), fresh(dataclasses.replace(base, **{name: CHANGES[name]}))
    group = crops((2, 4, 24, 24))[0]
    other = group[:, None].expand(-1, 2, -1, -1, -1) if name == "in_chans" else group

    def result(model: vit.VisionTransformer, voxels: Tensor) -> Tensor:
        # several steps: two roundings of 1.8 crops agree in one draw of five
        return torch.cat(
            [model([voxels], None, DropKey(0, step))[0].cls_BD.flatten() for step in range(4)]
        )

    one, two = result(before, group), result(after, other)
    assert one.shape != two.shape or not torch.allclose(one, two)


@pytest.mark.parametrize("shape", [(3, 1, 4, 16, 16), (3, 4, 16, 16), (4, 16, 16)])
def test_one_tensor_in_place_of_a_list_of_groups_is_refused(shape: tuple[int, ...]) -> None:
    """Its first axis would be taken as groups: a batch of three gave three results of one crop."""
    model = fresh(TINY)
    for call in (model, lambda crops: model.tokens_of_blocks(crops, [0])):
        with pytest.raises(UserError, match=r"one tensor of shape .*call it with \[crops\]"):
            call(torch.zeros(shape))
    with pytest.raises(UserError, match=r"takes \(B, Z, Y, X\); reshape them"):
        model([torch.zeros(3, 1, 4, 16, 16)])
