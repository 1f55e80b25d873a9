"""A new run may start from weights that exist; what does not fit is reported and
must be allowed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import config_of

from tapct.base.exits import UserError
from tapct.engine import initial
from tapct.nn.posembed import resize_positions
from tapct.run import finished as trained_runs
from tapct.run import pretrain


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
        match=r"1 parameters .* are resized, e.g. pos_embed.* train.init_allow=\[resized\]",
    ):
        first_teacher(tmp_path, store, *wider)
    found = first_teacher(tmp_path, store, *wider, "train.init_allow=[resized]")
    old = load_file(trained / "export" / "model.safetensors")["pos_embed"]
    assert torch.equal(found["pos_embed"][0, 0], old[0, 0])
    assert torch.equal(
        found["pos_embed"][0, 1:], resize_positions(old[0, 1:], (2, 2, 2), (2, 3, 3))
    )
    assert "resized    1: pos_embed" in capsys.readouterr().out


def test_missing_and_unexpected_parameters_are_named_and_must_be_meant(
    tmp_path: Path, store: Path, trained: Path
) -> None:
    tensors = load_file(trained / "export" / "model.safetensors")
    tensors["extra.weight"] = tensors.pop("norm.weight")
    save_file(tensors, tmp_path / "odd.safetensors")
    source = f"train.init={tmp_path / 'odd.safetensors'}"
    with pytest.raises(UserError, match="are missing, e.g. norm.weight"):
        first_teacher(tmp_path, store, source)
    with pytest.raises(
        UserError, match=r"are unexpected, e.g. extra.weight; .*\[missing,unexpected\]"
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
    save_file({f"model.{name}": value for name, value in tensors.items()}, odd)
    allowed = "train.init_allow=[missing,resized,unexpected]"
    with pytest.raises(
        UserError,
        match=rf"none of the {len(tensors)} tensors of .* has the name of a parameter of this model"
        r"; the file has model\.blocks.*; the model has blocks",
    ):
        first_teacher(tmp_path, store, f"train.init={odd}", allowed)


def test_what_cannot_fit_or_is_not_there_is_one_line(
    tmp_path: Path, store: Path, trained: Path
) -> None:
    with pytest.raises(UserError, match="does not fit this model: .* is .* there and .* here"):
        first_teacher(tmp_path, store, f"train.init={trained}", "model.dim=32")
    with pytest.raises(
        UserError, match="give a run folder, a checkpoint, an export or a .safetensors file"
    ):
        first_teacher(tmp_path, store, f"train.init={tmp_path / 'nothing'}")
    with pytest.raises(
        UserError, match="train.init_allow: mising is none of missing, resized, unexpected"
    ):
        first_teacher(tmp_path, store, "train.init_allow=[mising]")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0broken")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        initial.read(tmp_path / "broken.safetensors")
