"""A new run may start from weights that exist; what does not fit is reported and
must be allowed.
"""

from __future__ import annotations

from pathlib import Path

import foreign_weights as foreign
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import config_of
from weights_parity import file_of, prefixed

import tapct
from tapct.base.exits import UserError
from tapct.config import load_config, plugins
from tapct.nn.posembed import resize_positions
from tapct.run import finished as trained_runs
from tapct.run import importing, pretrain
from tapct.run.config import RunConfig
from tapct.run.lineage import scans_of_run
from tapct.weights import initial, sources
from tapct.weights.export import scans_of_export
from tapct.weights.inflate import resize_kernel


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    pretrain.train(config_of(folder, store, "train.steps=3"))
    trained_runs.export(folder / "run")
    return folder / "run"


def first_teacher(folder: Path, store: Path, *words: str) -> dict[str, torch.Tensor]:
    """The teacher after one step in which nothing can have moved it: lr 0."""
    frozen = ("train.steps=1", "optim.lr=1e-30", "optim.min_lr=0.0", "optim.momentum=[1.0,1.0]")
    pretrain.train(config_of(folder, store, *frozen, *words))
    return load_file(folder / "run" / "checkpoints" / "step_00000001" / "teacher.safetensors")


@pytest.mark.parametrize(
    "source", ["", "checkpoints/step_00000003", "export", "export/model.safetensors"]
)
def test_a_run_starts_from_a_run_a_checkpoint_an_export_or_a_file(
    tmp_path: Path, store: Path, trained: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = load_file(trained / "checkpoints" / "step_00000003" / "teacher.safetensors")
    found = first_teacher(tmp_path, store, f"train.init={trained / source}")
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
    assert f"{len(wanted)} parameters loaded" in capsys.readouterr().out


def test_positions_of_another_window_are_resized_when_that_is_meant(
    tmp_path: Path, store: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wider = (f"train.init={trained}", "model.window=[4,24,24]", "views.global_window=[4,24,24]")
    with pytest.raises(
        UserError,
        match=r"1 parameter .* is resized, e.g. pos_embed.* train.init_allow=\[resized\]",
    ):
        first_teacher(tmp_path, store, *wider)
    found = first_teacher(tmp_path, store, *wider, "train.init_allow=[resized]")
    old = load_file(trained / "export" / "model.safetensors")["pos_embed"]
    assert torch.equal(found["pos_embed"][0, 0], old[0, 0])
    assert torch.equal(
        found["pos_embed"][0, 1:], resize_positions(old[0, 1:], (2, 2, 2), (2, 3, 3))
    )
    assert "resized    1: pos_embed" in capsys.readouterr().out


def test_load_pretrained_reads_a_run_and_a_checkpoint_with_the_settings_of_training(
    tmp_path: Path, store: Path
) -> None:
    pretrain.train(config_of(tmp_path, store, "train.steps=1", "contract.mean=-50.0"))
    run = tmp_path / "run"
    teacher = load_file(run / "checkpoints" / "step_00000001" / "teacher.safetensors")
    for source in (run, run / "checkpoints" / "step_00000001"):
        loaded = tapct.load_pretrained(source)
        state = loaded.model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in teacher.items())
        assert loaded.contract.mean == -50.0
        assert loaded.preprocess.window == (4, 16, 16)
        assert (loaded.provenance["run"], loaded.provenance["step"]) == ("run", 1)
        loaded.half()  # own weights may
    importing.import_weights(run, tmp_path / "out")
    assert (
        scans_of_export(tmp_path / "out").from_step.keys() == scans_of_run(run, 1).from_step.keys()
    )
    with pytest.raises(UserError, match="allow='resized'"):
        tapct.load_pretrained(run, ["model.window=[4,24,24]"])
    wider = tapct.load_pretrained(run, ["model.window=[4,24,24]"], allow="resized")
    assert wider.model.pos_embed.shape == (1, 1 + 2 * 3 * 3, 16)


def test_a_run_starts_from_a_2d_backbone_of_another_project(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = foreign.dinov2((3, 16, 16), 14 * 14, dim=16, registers=1)
    torch.save({"teacher": prefixed(tensors, "backbone.")}, tmp_path / "dino.pth")
    words = (f"train.init={tmp_path / 'dino.pth'}", "train.init_inflate=centre")
    with pytest.raises(UserError, match=r"2 parameters .* are inflated.*init_allow=\[inflated\]"):
        first_teacher(tmp_path, store, *words)
    found = first_teacher(tmp_path, store, *words, "train.init_allow=[inflated]")
    for name in ("blocks.1.attn.qkv.weight", "cls_token", "norm.bias"):
        assert torch.equal(found[name], tensors[name]), name
    kernel = found["patch_embed.proj.weight"]
    assert kernel.shape == (16, 1, 2, 8, 8) and not kernel[:, :, 0].any()
    grey = tensors["patch_embed.proj.weight"].sum(1, keepdim=True)[:, :, None]
    torch.testing.assert_close(kernel[:, :, 1:], resize_kernel(grey, (1, 8, 8)))
    printed = capsys.readouterr().out
    assert "2D, patch 1x16x16, 3 channels, positions for 1x14x14 patches" in printed
    assert "blocks.*.attn.qkv" in printed


def test_layer_scale_that_the_weights_lack_is_set_to_1(tmp_path: Path, store: Path) -> None:
    tensors = foreign.dinov2((1, 2, 8, 8), 2 * 2 * 2, dim=16, registers=1)
    plain = {name: value for name, value in tensors.items() if not name.endswith("gamma")}
    save_file(plain, tmp_path / "plain.safetensors")
    words = (f"train.init={tmp_path / 'plain.safetensors'}", "train.init_window=[4,16,16]")
    found = first_teacher(tmp_path, store, *words, "train.init_allow=[missing]")
    assert (found["blocks.0.ls1.gamma"] == 1).all() and (found["blocks.1.ls2.gamma"] == 1).all()


def test_missing_and_unexpected_parameters_are_named_and_must_be_meant(
    tmp_path: Path, store: Path, trained: Path
) -> None:
    tensors = load_file(trained / "export" / "model.safetensors")
    tensors["extra.weight"] = tensors.pop("norm.weight")
    save_file(tensors, tmp_path / "odd.safetensors")
    source = f"train.init={tmp_path / 'odd.safetensors'}"
    with pytest.raises(UserError, match="is missing, e.g. norm.weight"):
        first_teacher(tmp_path, store, source)
    with pytest.raises(
        UserError, match=r"is unexpected, e.g. extra.weight; .*\[missing,unexpected\]"
    ):
        first_teacher(tmp_path, store, source, "train.init_allow=[missing]")
    found = first_teacher(tmp_path, store, source, "train.init_allow=[missing,unexpected]")
    assert torch.equal(found["norm.weight"], torch.ones(16)) and torch.equal(
        found["norm.bias"], tensors["norm.bias"]
    )


def test_weights_without_one_parameter_of_the_model_are_an_error_that_names_both_sides(
    tmp_path: Path, store: Path, trained: Path
) -> None:
    tensors = load_file(trained / "export" / "model.safetensors")
    odd = tmp_path / "odd.safetensors"
    save_file({f"other_{name}": value for name, value in tensors.items()}, odd)
    allowed = "train.init_allow=[missing,resized,unexpected]"
    with pytest.raises(
        UserError,
        match=rf"none of the {len(tensors)} tensors of .* has the name of a parameter of this model"
        r"; the file has other_blocks.*; the model has blocks",
    ):
        first_teacher(tmp_path, store, f"train.init={odd}", allowed)


def test_what_cannot_fit_or_is_not_there_is_one_line(
    tmp_path: Path, store: Path, trained: Path
) -> None:
    with pytest.raises(UserError, match="does not fit this model: .* is .* there and .* here"):
        first_teacher(tmp_path, store, f"train.init={trained}", "model.dim=32")
    with pytest.raises(UserError, match=r"trained with 2 heads and .* set model\.heads=2"):
        first_teacher(tmp_path, store, f"train.init={trained}", "model.heads=4")
    with pytest.raises(
        UserError, match="nothing: give a run folder, a checkpoint, an export, a Hugging Face"
    ):
        first_teacher(tmp_path, store, f"train.init={tmp_path / 'nothing'}")
    with pytest.raises(
        UserError,
        match="train.init_allow: mising is none of missing, resized, inflated, unexpected",
    ):
        first_teacher(tmp_path, store, "train.init_allow=[mising]")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0broken")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        sources.read(tmp_path / "broken.safetensors")


@pytest.mark.parametrize(
    ("registers", "allowed"), [(4, ""), (0, "train.init_allow=[inflated,missing]")]
)
def test_the_config_that_continues_from_2d_takes_dinov2s_shapes(
    tmp_path: Path, registers: int, allowed: str
) -> None:
    """Patch 14x14, 37x37 positions, with and without registers; only the width is smaller."""
    tensors = foreign.dinov2((3, 14, 14), 37 * 37, dim=64, depth=2, registers=registers)
    torch.save(tensors, tmp_path / "dinov2_vitb14.pth")
    small = ["model.dim=64", "model.heads=1", "model.depth=2"]
    words = [*small, f"train.init={tmp_path / 'dinov2_vitb14.pth'}", *filter(None, [allowed])]
    path = Path(__file__).resolve().parents[2] / "configs" / "tap_b_3d_from_2d.yaml"
    config = load_config(RunConfig, path, words).value
    with torch.device("meta"):
        backbone = plugins.load("models", "vit").build(config.model.config)
    initial.check(config.train, backbone)
    assert config.model.config.patch == (4, 8, 8)


@pytest.mark.parametrize(
    ("allowed", "fits"),
    [
        ("resized", True),
        ("inflated", True),
        ("resized,missing,unexpected", True),
        ("missing,unexpected", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("name", ["tap_s_2d", "tap_s_3d"])
def test_who_allows_resized_allows_inflated(
    tmp_path: Path, name: str, allowed: str, fits: bool
) -> None:
    """A 2D DINOv2 with patches of 16x16 and RGB, for the 2D and the 3D model."""
    tensors = foreign.dinov2((3, 16, 16), 14 * 14, dim=32, depth=1, registers=4)
    file = file_of(tensors)(tmp_path)
    words = ["model.dim=32", "model.heads=2", "model.depth=1", f"train.init={file}"]
    path = Path(__file__).resolve().parents[2] / "configs" / f"{name}.yaml"
    config = load_config(RunConfig, path, [*words, f"train.init_allow=[{allowed}]"]).value
    with torch.device("meta"):
        backbone = plugins.load("models", "vit").build(config.model.config)
    if fits:
        initial.check(config.train, backbone)
        return
    with pytest.raises(UserError, match=r"inflated, e\.g\. patch_embed.* set train\.init_allow=\["):
        initial.check(config.train, backbone)
