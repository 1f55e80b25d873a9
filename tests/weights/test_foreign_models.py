"""Weights of other projects give the features of a network that is written out without tapct, and
what is not a fit is refused by name.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import foreign_weights as foreign
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from weights_parity import Way, file_of, largest_difference, prefixed, ways

import tapct
from tapct.base.exits import UserError
from tapct.config.plugins import Plugin
from tapct.eval.features.preprocess import Preprocess
from tapct.models import vit
from tapct.nn import rope
from tapct.types import HUContract, Volume
from tapct.weights import sources
from tapct.weights.card import FeatureSettings
from tapct.weights.huggingface.folder import save_folder
from tapct.weights.huggingface.model_card import ModelFacts

WAYS = ways()
RGB = foreign.dinov2()
TAP = foreign.dinov2((1, 4, 8, 8), 3 * 28 * 28, registers=4)


@pytest.mark.parametrize("way", WAYS, ids=[way.name for way in WAYS])
def test_features_equal_those_of_a_network_written_out(way: Way, tmp_path: Path) -> None:
    difference, _ = largest_difference(way, tmp_path / "source")
    assert difference < 1e-5


def test_a_published_3d_folder_gets_its_native_window_and_linear_positions(tmp_path: Path) -> None:
    source = file_of(prefixed(TAP, "model."), model_type="tapct")(tmp_path / "tap-ct-b-3d")
    loaded = tapct.load_pretrained(source)
    config = loaded.section.config
    assert (config.window, config.patch, config.heads) == ((12, 224, 224), (4, 8, 8), 2)
    assert (config.pos_resize, config.pos_offset, config.norm_eps) == ("linear", 0.0, 1e-6)
    assert loaded.preprocess.window == (12, 224, 224)
    assert loaded.preprocess.stride == (8, 112, 112)
    assert loaded.provenance["published_as"] == "tap-ct-b-3d"
    assert loaded.provenance["fit"] == {"loaded": len(TAP)}


def test_settings_replace_those_of_the_weights(tmp_path: Path) -> None:
    source = file_of(TAP)(tmp_path)
    words = ["model.pos_offset=0.1", "preprocess.resize=linear", "preprocess.clip=after_resize",
             "preprocess.size_yx=[32,32]", "preprocess.window=[4,32,32]",
             "preprocess.stride=[4,32,32]", "hu_contract.mean=-100.0"]  # fmt: skip
    loaded = tapct.load_pretrained(source, words)
    assert loaded.section.config.pos_offset == 0.1
    assert (loaded.preprocess.resize, loaded.contract.mean) == ("linear", -100.0)
    hu = np.random.default_rng(0).integers(-1024, 1500, (4, 40, 36)).astype(np.int16)
    assert loaded.embed(Volume(hu, (2.0, 1.0, 1.0))).features_DZYX.shape == (128, 1, 4, 4)
    with pytest.raises(UserError, match="clipp.*before_resize"):
        tapct.load_pretrained(source, ["preprocess.clip=clipp"])


def test_a_window_that_nobody_states_is_asked_for(tmp_path: Path) -> None:
    odd = foreign.dinov2((1, 4, 8, 8), 2 * 3 * 5)
    source = file_of(odd)(tmp_path)
    with pytest.raises(UserError, match="window .* not known; give it"):
        tapct.load_pretrained(source)
    loaded = tapct.load_pretrained(source, window=(8, 24, 40))
    assert loaded.section.config.window == (8, 24, 40)
    with pytest.raises(UserError, match=r"31 rows .* 8x24x48 .* has 36"):
        tapct.load_pretrained(source, window=(8, 24, 48))


def test_the_window_is_not_guessed_from_a_number_that_other_windows_have(tmp_path: Path) -> None:
    """96x112x112 voxels in patches of 8 are as many as 24x224x224: 2352."""
    tensors = foreign.dinov2((1, 8, 8, 8), 2352)
    with pytest.raises(UserError, match="window .* not known; give it"):
        tapct.load_pretrained(file_of(tensors)(tmp_path / "a"))
    source = file_of(tensors, architectures=["TAPCTModel"])(tmp_path / "b")
    assert tapct.load_pretrained(source).section.config.window == (24, 224, 224)
    slab = foreign.dinov2((1, 6, 16, 16), 14 * 14)
    loaded = tapct.load_pretrained(file_of(slab)(tmp_path / "c"))
    assert loaded.section.config.window == (6, 224, 224)


def test_a_norm_of_cls_alone_is_refused(tmp_path: Path) -> None:
    tensors = TAP | {"cls_norm.weight": torch.ones(128), "cls_norm.bias": torch.zeros(128)}
    with pytest.raises(UserError, match="a layer norm for CLS alone"):
        tapct.load_pretrained(file_of(tensors)(tmp_path), allow="unexpected")


def test_what_is_not_a_fit_must_be_allowed_and_all_of_it_is_named(tmp_path: Path) -> None:
    tensors = foreign.as_timm(RGB) | {"head.weight": torch.zeros(5, foreign.DIM)}
    source = file_of(tensors)(tmp_path)
    with pytest.raises(UserError) as error:
        tapct.load_pretrained(source)
    line = str(error.value)
    for part in ("1 parameter of", "is missing, e.g. mask_token", "1 is inflated",
                 "sum of 3 channels", "1 is unexpected, e.g. head.weight",
                 "allow='missing,inflated,unexpected'"):  # fmt: skip
        assert part in line, part
    assert "\n" not in line
    with pytest.raises(UserError, match="mising is none of missing, resized"):
        tapct.load_pretrained(source, allow="mising")
    tapct.load_pretrained(source, allow=["missing", "inflated", "unexpected"])


def test_nothing_loaded_is_an_error_whatever_is_allowed(tmp_path: Path) -> None:
    everything = ("missing", "resized", "inflated", "unexpected")
    save_file({"encoder.weight": torch.zeros(2, 2)}, tmp_path / "unet.safetensors")
    with pytest.raises(UserError, match="none of the 1 tensors .* the file has encoder.weight"):
        tapct.load_pretrained(tmp_path / "unet.safetensors", allow=everything)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "exploded",)

    torch.save({"teacher": RGB, "args": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match="Python objects beside its tensors.*safetensors"):
        tapct.load_pretrained(tmp_path / "bomb.pth")
    assert not (tmp_path / "exploded").exists()
    (tmp_path / "cut.pth").write_bytes(b"PK\3\4 not a zip")
    with pytest.raises(UserError, match=r"cut\.pth"):
        tapct.load_pretrained(tmp_path / "cut.pth")


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    name = "blocks.0.mlp.fc1.weight"
    quantised = TAP | {name: (100 * TAP[name]).to(torch.int8)}
    with pytest.raises(UserError, match=r"mlp\.fc1\.weight is torch\.int8 there, as in quantised"):
        tapct.load_pretrained(file_of(quantised)(tmp_path))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    broken = dict(TAP)
    broken["norm.bias"] = broken["norm.bias"].clone()
    broken["norm.bias"][3] = float("nan")
    with pytest.raises(UserError, match=r"norm\.bias has numbers that are not finite"):
        tapct.load_pretrained(file_of(broken)(tmp_path))


def test_float16_is_refused_for_published_weights_with_the_reason(tmp_path: Path) -> None:
    loaded = tapct.load_pretrained(file_of(TAP)(tmp_path))
    reason = "float16 is refused for published weights.*NaN"
    with pytest.raises(UserError, match=reason):
        loaded.half()
    with pytest.raises(UserError, match=reason):
        loaded.to("cpu", torch.float16)
    with pytest.raises(UserError, match=reason):
        loaded(torch.zeros(1, 4, 8, 8, dtype=torch.float16))
    with pytest.raises(UserError, match=reason), torch.autocast("cpu", torch.float16):
        loaded(torch.zeros(1, 4, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert loaded(torch.zeros(1, 4, 8, 8)).cls_BD.isfinite().all()
    assert loaded.to(torch.float64) is loaded
    assert loaded.type(torch.float32) is loaded


def test_float16_is_refused_on_every_way_that_torch_and_tapct_have(tmp_path: Path) -> None:
    """Also through the type of another tensor, and around the features of a whole scan."""
    loaded = tapct.load_pretrained(file_of(TAP)(tmp_path))
    reason = "float16 is refused for published weights.*NaN"
    hu = np.full((4, 8, 8), -1000, np.int16)
    hu[:, 2:6, 2:6] = 40
    volume = tapct.Volume(hu, (3.0, 1.0, 1.0))
    for change in (
        lambda: loaded.to(torch.zeros(1, dtype=torch.float16)),
        lambda: loaded.type(torch.float16),
        lambda: loaded.type("torch.HalfTensor"),
    ):
        with pytest.raises(UserError, match=reason):
            change()
    for call in (loaded.embed, loaded.dense):
        with pytest.raises(UserError, match=reason), torch.autocast("cpu", torch.float16):
            call(volume)
    loaded.model.half()  # the backbone itself
    for call in (loaded.embed, loaded.dense, lambda _: loaded(torch.zeros(1, 4, 8, 8))):
        with pytest.raises(UserError, match=reason):
            call(volume)


def test_a_call_without_a_window_is_refused(tmp_path: Path) -> None:
    """All windows of a scan would be one batch, whatever the memory."""
    loaded = tapct.load_pretrained(file_of(TAP)(tmp_path))
    volume = tapct.Volume(np.full((4, 8, 8), -1000, np.int16), (3.0, 1.0, 1.0))
    for batch in (0, -1):
        for call in (loaded.embed, loaded.dense):
            with pytest.raises(UserError, match=f"batch is {batch}; give at least 1"):
                call(volume, batch=batch)


def test_a_file_that_torch_has_not_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "junk.pth").write_bytes(b"junk" * 100)
    with pytest.raises(UserError, match=r"junk\.pth cannot.*torch\.save has not written it"):
        tapct.load_pretrained(tmp_path / "junk.pth")


def test_the_only_teacher_of_a_training_checkpoint_is_read_and_the_rest_is_named(
    tmp_path: Path,
) -> None:
    tree = {"teacher": prefixed(RGB, "module.backbone.") | {"dino_head.weight": torch.zeros(1)}}
    torch.save(tree, tmp_path / "t.pth")
    weights = sources.read(tmp_path / "t.pth")
    assert weights.tensors.keys() == RGB.keys()
    assert weights.set_aside == {"teacher.dino_head": 1}
    torch.save({"a": RGB, "b": RGB}, tmp_path / "two.pth")
    with pytest.raises(UserError, match=r"2 backbones \(a\., b\.\) and not one teacher"):
        sources.read(tmp_path / "two.pth")


def test_shards_are_read_together_and_none_from_elsewhere(tmp_path: Path) -> None:
    names = sorted(TAP)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({f"model.{name}": TAP[name] for name in part}, tmp_path / file)
    places = {f"model.{name}": file for file, part in shards.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert sources.locate(tmp_path) == index
    loaded = tapct.load_pretrained(tmp_path).model
    assert torch.equal(loaded.norm.bias, TAP["norm.bias"])
    index.write_text(json.dumps({"weight_map": {"x": "../one.safetensors"}}))
    with pytest.raises(UserError, match="outside of its folder"):
        tapct.load_pretrained(tmp_path)


def test_rows_for_registers_in_the_positions_become_part_of_the_registers(tmp_path: Path) -> None:
    with_rows = dict(TAP)
    rows = 0.1 * torch.randn(1, 4, foreign.DIM)
    pos = TAP["pos_embed"]
    with_rows["pos_embed"] = torch.cat([pos[:, :1], rows, pos[:, 1:]], dim=1)
    loaded = tapct.load_pretrained(file_of(with_rows)(tmp_path)).model
    assert torch.equal(loaded.pos_embed, pos)
    assert torch.equal(loaded.register_tokens, TAP["register_tokens"] + rows)


def test_a_hub_id_is_read_from_the_local_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    model = tmp_path / "models--fomofo--tap-ct-b-3d"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc123")
    file_of(prefixed(TAP, "model."), model_type="tapct")(model / "snapshots" / "abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = tapct.load_pretrained("fomofo/tap-ct-b-3d")
    assert torch.equal(found.model.pos_embed, TAP["pos_embed"])
    assert found.provenance["published_as"] == "fomofo/tap-ct-b-3d"
    with pytest.raises(UserError, match="no model of this name; fetch it with `hf download"):
        tapct.load_pretrained("fomofo/tap-ct-x-9d")


def test_what_the_hub_cache_returns_is_read_with_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for huggingface_hub, which need not be installed for the tests."""
    calls = []

    class NotThere(Exception):
        pass

    def snapshot_download(name: str, *, revision: str | None, local_files_only: bool) -> str:
        calls.append((name, revision, local_files_only))
        if name == "some/other":
            raise NotThere
        return str(tmp_path)

    errors = ModuleType("huggingface_hub.errors")
    errors.LocalEntryNotFoundError = errors.HfHubHTTPError = NotThere  # type: ignore[attr-defined]
    package = ModuleType("huggingface_hub")
    package.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    with pytest.raises(UserError, match="no weights of this model, only other files"):
        tapct.load_pretrained("fomofo/tap-ct-b-3d@v1")
    file_of(TAP)(tmp_path)
    loaded = tapct.load_pretrained("fomofo/tap-ct-b-3d@v1")
    assert torch.equal(loaded.model.pos_embed, TAP["pos_embed"])
    assert calls[-1] == ("fomofo/tap-ct-b-3d", "v1", True)
    with pytest.raises(UserError, match="`hf download some/other --revision v2`"):
        tapct.load_pretrained("some/other@v2")


def test_a_hub_id_without_the_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        UserError, match="huggingface_hub is not installed; .*pip install huggingface_hub"
    ):
        tapct.load_pretrained("fomofo/tap-ct-b-3d")


LEARNED = vit.Config(
    window=(4, 24, 40), patch=(2, 4, 8), dim=64, depth=2, heads=4, registers=2, layer_scale=None
)
BOTH = replace(
    LEARNED, positions="both", qk_norm=True, ffn="swiglu", pos_resize="linear", layer_scale=1.0,
    rope=rope.Config(axes="yx", base=50.0),
)  # fmt: skip
OFFSET = replace(LEARNED, qkv_bias=False, pos_offset=0.1, norm_eps=1e-5, mlp_ratio=3.0)


@pytest.mark.parametrize("config", [LEARNED, BOTH, OFFSET], ids=["learned", "both", "offset"])
def test_a_folder_of_export_hf_comes_back_with_all_its_settings(
    config: vit.Config, tmp_path: Path
) -> None:
    model = vit.build(config).eval()
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=draw)
    preprocess = Preprocess(
        (48, 80), (4, 24, 40), (2, 12, 24), 0.5, resize="cubic", clip="after_resize", pad="raw"
    )
    contract = HUContract(-900.0, 700.0, -50.0, 300.0)
    settings = FeatureSettings(Plugin("vit", config), contract, preprocess)
    save_folder(tmp_path / "hf", model, settings, ModelFacts("x"))
    loaded = tapct.load_pretrained(tmp_path / "hf")
    assert (loaded.preprocess, loaded.contract) == (preprocess, contract)
    assert loaded.provenance["names"] == "DINOv2" and "published_as" not in loaded.provenance
    loaded_config = loaded.section.config
    assert (loaded_config.window, loaded_config.heads) == ((4, 24, 40), 4)
    crops = torch.randn(2, 6, 20, 32, generator=draw)
    with torch.no_grad():
        want, got = model([crops])[0], loaded(crops)
    torch.testing.assert_close(got.patches_BND, want.patches_BND, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.cls_BD, want.cls_BD, rtol=0, atol=1e-5)
    loaded.half()  # not weights of another project
    (tmp_path / "hf" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json .*export again"):
        tapct.load_pretrained(tmp_path / "hf")
