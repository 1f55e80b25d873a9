"""Exports: what goes out comes back bit for bit, and what is damaged or foreign is refused
with a one-line error.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tapct
from tapct.base.exits import UserError
from tapct.base.files import sha256
from tapct.config.plugins import Plugin
from tapct.eval.features.extraction import dense_features
from tapct.eval.features.preprocess import Preprocess
from tapct.models import vit
from tapct.nn import rope
from tapct.types import HUContract, Volume
from tapct.weights import card
from tapct.weights.card import FeatureSettings
from tapct.weights.export import save_export
from tapct.weights.pretrained import Pretrained, load_pretrained

VIT = vit.Config(
    window=(4, 16, 16), patch=(2, 4, 4), dim=16, depth=2, heads=2, registers=1, drop_path=0.3
)
CONTRACT = HUContract(-900.0, 700.0, -50.0, 300.0)
PREPROCESS = Preprocess((24, 20), (4, 16, 16), (2, 8, 8), 0.5)
SETTINGS = FeatureSettings(Plugin("vit", VIT), CONTRACT, PREPROCESS)
FIRST = {  # settings in the cards of the first exports
    "model": (
        *("window", "patch", "in_chans", "dim", "depth", "heads", "mlp_ratio", "ffn", "qkv_bias"),
        *("registers", "layer_scale", "drop_path", "drop_path_rounding", "pos_resize"),
        "attention",
    ),
    "preprocess": ("size_yx", "window", "stride", "border_weight"),
}


@pytest.fixture
def teacher() -> torch.nn.Module:
    model = vit.build(VIT)
    model.init_weights(5)
    return model.eval()


@pytest.fixture
def folder(teacher, tmp_path: Path) -> Path:
    out = tmp_path / "run" / "export"
    save_export(out, teacher, SETTINGS, {"run": "test", "step": 7})
    return out


def edit(folder: Path, change) -> None:
    card = json.loads((folder / "config.json").read_text())
    change(card)
    (folder / "config.json").write_text(json.dumps(card))


def volume() -> Volume:
    hu = np.random.default_rng(0).integers(-1024, 1500, (7, 30, 26)).astype(np.int16)
    return Volume(hu, (2.5, 0.8, 0.9))


def test_features_equal_the_teachers_bit_for_bit(teacher, folder):
    pretrained = load_pretrained(folder)
    crops = torch.randn(3, 4, 16, 16)
    with torch.no_grad():
        expected = teacher([crops])[0]
    for given in (crops, crops[:, None]):
        tokens = pretrained(given)
        assert torch.equal(tokens.patches_BND, expected.patches_BND)
        assert torch.equal(tokens.cls_BD, expected.cls_BD)
    assert (pretrained.contract, pretrained.preprocess) == (CONTRACT, PREPROCESS)
    assert pretrained.section == Plugin("vit", VIT)
    assert pretrained.provenance["step"] == 7
    assert pretrained.provenance["torch"] == torch.__version__


def test_embedding_equals_dense_features_and_is_written_whole(teacher, folder, tmp_path):
    embedding = load_pretrained(folder).embed(volume())
    dense = dense_features(teacher, volume().hu_ZYX, CONTRACT, PREPROCESS)
    np.testing.assert_array_equal(embedding.features_DZYX, dense.features_DZYX.numpy())
    np.testing.assert_array_equal(embedding.cls_D, dense.cls_D.numpy())
    assert embedding.features_DZYX.shape == (16, 4, 6, 5)
    assert embedding.spacing_mm == pytest.approx((5.0, 4 * 0.8 * 30 / 24, 4 * 0.9 * 26 / 20))
    embedding.write_npz(tmp_path / "deep" / "features.npz")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["features.npz"]
    with np.load(tmp_path / "deep" / "features.npz", allow_pickle=False) as back:
        names = {field.name for field in dataclasses.fields(embedding)}
        assert set(back) == names - {"block"}  # the last block is features_DZYX
        np.testing.assert_array_equal(back["features_DZYX"], embedding.features_DZYX)
        assert tuple(back["original"]) == (7, 30, 26)


def test_pretrained_stays_frozen_and_in_eval_mode(folder):
    pretrained = load_pretrained(folder).train()
    assert not any(module.training for module in pretrained.modules())
    assert not any(parameter.requires_grad for parameter in pretrained.parameters())


def test_a_run_folder_and_the_package_lead_to_its_export(folder):
    assert isinstance(tapct.load_pretrained(folder.parent), Pretrained)


def test_a_second_export_replaces_the_first_and_leaves_nothing_beside(teacher, folder):
    with torch.no_grad():
        teacher.norm.bias.add_(1)
    save_export(folder, teacher, SETTINGS, {})
    assert torch.equal(load_pretrained(folder).model.norm.bias, teacher.norm.bias)
    assert [path.name for path in folder.parent.iterdir()] == ["export"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_full_disk_leaves_the_old_export(teacher, folder, monkeypatch):
    before = {path.name: sha256(path) for path in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tapct.weights.export.save_file", full)
    with pytest.raises(UserError, match="cannot write the export.*no space left on the disk"):
        save_export(folder, teacher, SETTINGS, {})
    assert {path.name: sha256(path) for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_crops_of_a_wrong_shape_are_one_line(folder):
    pretrained = load_pretrained(folder)
    for shape in ((4, 16, 16), (1, 2, 4, 16, 16)):
        with pytest.raises(UserError, match=r"crops are .*\(B, Z, Y, X\)"):
            pretrained(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="other"), "not a tapct export"),
        (lambda c: c.update(format_version=99), "format version 99, this tapct reads 1"),
        (lambda c: c.update(surprise=1), "unknown key 'surprise'"),
        (lambda c: c["model"].update(dims=16), "dims.*dim"),
        (lambda c: c["model"].update(dim="wide"), "dim"),
        (lambda c: c["model"].update(name="vitt"), "vitt"),
        (lambda c: c["model"].pop("depth"), "lacks model.depth"),
        (lambda c: c["hu_contract"].pop("mean"), "lacks hu_contract.mean"),
        (lambda c: c.pop("preprocess"), "lacks preprocess"),
        (lambda c: c.pop("weights"), "lacks weights.sha256"),
        (lambda c: c.pop("provenance"), "lacks the section provenance"),
        (lambda c: c["model"].update(depth=3), r"blocks\.2\..* is absent in the file"),
        (lambda c: c["model"].update(dim=32), "is .* in the file, .* in the model"),
        (lambda c: c["preprocess"].update(stride=[8, 8, 8]), "stride"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(folder, change, message):
    edit(folder, change)
    with pytest.raises(UserError, match=message) as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value)


def test_an_export_of_a_version_without_the_later_settings_gives_the_same_features(folder):
    crops = torch.randn(2, 4, 16, 24)
    before = load_pretrained(folder)(crops).patches_BND

    def keep_the_first(content) -> None:
        """The settings of the first exports; later ones are not there."""
        for section, keys in FIRST.items():
            own = content[section]
            content[section] = {key: own[key] for key in ("name", *keys) if key in own}

    edit(folder, keep_the_first)
    loaded = load_pretrained(folder)
    assert torch.equal(loaded(crops).patches_BND, before)
    assert loaded.settings == SETTINGS


def test_every_setting_that_the_first_exports_lack_has_the_value_that_they_imply():
    """A setting that is new must be named in LATER, or no earlier export can be loaded."""
    for section, kind in (("model", vit.Config), ("preprocess", Preprocess)):
        names = {field.name for field in dataclasses.fields(kind)}
        assert names == {*FIRST[section], *card.LATER[section]}, section
    assert {field.name for field in dataclasses.fields(rope.Config)} == {*card.LATER["model.rope"]}


def test_missing_parts_are_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="no folder"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_pretrained(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        load_pretrained(folder)
    (folder / "model.safetensors").touch()
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_pretrained(folder)


def test_one_changed_byte_is_noticed(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="damaged: its sha256"):
        load_pretrained(folder)


def test_a_pickle_under_the_weights_name_is_never_unpickled(folder):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (folder / "exploded",))

    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    edit(folder, lambda card: card["weights"].update(sha256=sha256(folder / "model.safetensors")))
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_pretrained(folder)
    assert not (folder / "exploded").exists()


def test_an_extra_tensor_is_refused(teacher, folder):
    state = {**teacher.state_dict(), "extra": torch.zeros(2, 3)}
    save_file(state, folder / "model.safetensors")
    edit(folder, lambda card: card["weights"].update(sha256=sha256(folder / "model.safetensors")))
    with pytest.raises(UserError, match="extra is 2x3 in the file, absent in the model"):
        load_pretrained(folder)


def test_a_module_named_by_an_export_is_not_imported_unasked(folder, tmp_path, monkeypatch):
    touch = f"from pathlib import Path\nPath({str(tmp_path / 'imported')!r}).touch()\n"
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "stranger.py").write_text(
        touch + "from tapct.models.vit import Config, build\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    edit(folder, lambda card: card["model"].update(name="pack.stranger"))
    with pytest.raises(UserError, match=r"pack\.stranger.*custom_code=True"):
        load_pretrained(folder)
    assert not (tmp_path / "imported").exists()
    assert load_pretrained(folder, custom_code=True).section.name == "pack.stranger"
