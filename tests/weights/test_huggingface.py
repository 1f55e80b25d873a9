"""A folder for transformers gives the features of tapct, and refuses weights that do not fit.

tests/weights/test_transformers_versions.py loads the same folders in environments without tapct.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scan_files import make_ct, write_nifti
from transformers_cases import (
    CONFIGS,
    CONTRACT,
    LEARNED,
    PREPROCESS,
    SHAPES,
    SPACING_MM,
    expected,
    network,
    settings_of,
    volume,
    write,
)

from tapct.base.exits import UserError
from tapct.data.scans.ingest import read_volume
from tapct.eval.features.extraction import dense_features
from tapct.eval.features.prepared import prepare
from tapct.eval.models.baselines import RawPatches
from tapct.models import vit
from tapct.nn import rope
from tapct.weights.huggingface import folder as hf_folder
from tapct.weights.huggingface import model_card
from tapct.weights.huggingface.folder import CODE_FILES, config_json, save_folder
from tapct.weights.huggingface.model_card import ModelFacts
from tapct.weights.pretrained import Pretrained, load_pretrained

# fields of the backbone's config that change no feature of a trained network
OF_TRAINING = {"drop_path", "drop_path_rounding", "attention", "mlp_ratio", "rope"}


@dataclasses.dataclass(frozen=True)
class Both:
    """One network in transformers and in tapct."""

    folder: Path
    model: Any
    processor: Any
    own: Pretrained


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """transformers, which copies the code of a folder into a cache before it imports it."""
    import transformers

    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.syspath_prepend(cache)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        yield transformers


@pytest.fixture(scope="module", params=CONFIGS)
def both(request: Any, hub: Any, tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("hf") / request.param
    own = write(folder, request.param)
    model = hub.AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = hub.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return Both(folder, model, processor, own)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_features_of_all_blocks_are_those_of_tapct(both: Both, shape: tuple[int, ...]) -> None:
    want = expected(both.own.model, shape)
    with torch.no_grad():
        found = both.model(want.crops[:, None], want.spacing_mm, output_hidden_states=True)
    assert len(found.hidden_states) == LEARNED.depth
    for one, other in zip(found.hidden_states, want.patches, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.last_hidden_state, want.patches[-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.pooler_output, want.cls, rtol=0, atol=1e-5)


def test_a_scan_is_prepared_and_embedded_as_by_tapct(both: Both) -> None:
    scan = volume()
    inputs = both.processor(scan.hu_ZYX, spacing_mm=SPACING_MM)
    patch = LEARNED.patch
    prepared = prepare(scan.hu_ZYX, CONTRACT, PREPROCESS, patch, spacing_mm=SPACING_MM)
    found = inputs["pixel_values"][0, 0]
    # only whole patches here; tapct pads to a whole window too
    torch.testing.assert_close(found, prepared.input_ZYX[: len(found)], rtol=0, atol=1e-5)
    assert inputs["spacing_mm"][0].tolist() == pytest.approx(prepared.spacing_mm)
    embedded, want = both.model.embed(**inputs, batch_size=3), both.own.embed(scan)
    np.testing.assert_allclose(embedded.feature_map[0].numpy(), want.features_DZYX, atol=1e-5)
    np.testing.assert_allclose(embedded.pooler_output[0].numpy(), want.cls_D, atol=1e-5)


@pytest.mark.parametrize("resize", ["linear", "cubic", "area", "nearest"])
def test_other_ways_to_prepare_a_scan_are_those_of_tapct(
    resize: str, hub: Any, tmp_path: Path
) -> None:
    preprocess = dataclasses.replace(PREPROCESS, resize=resize, clip="after_resize", pad="raw")
    settings = dataclasses.replace(settings_of(LEARNED), preprocess=preprocess)
    save_folder(tmp_path / "x", network(LEARNED), settings, ModelFacts("x"))
    processor = hub.AutoProcessor.from_pretrained(tmp_path / "x", trust_remote_code=True)
    found = processor(volume().hu_ZYX)["pixel_values"][0, 0]
    prepared = prepare(volume().hu_ZYX, CONTRACT, preprocess, LEARNED.patch)
    torch.testing.assert_close(found, prepared.input_ZYX[: len(found)], rtol=0, atol=1e-5)


@pytest.mark.parametrize("resize", ["antialias", "cubic"])
@pytest.mark.parametrize("clip", ["before_resize", "after_resize"])
def test_scans_that_are_resized_to_a_spacing_are_those_of_tapct(
    resize: str, clip: str, hub: Any, tmp_path: Path
) -> None:
    preprocess = dataclasses.replace(
        PREPROCESS, resize=resize, clip=clip, spacing_mm=(1.7, 0.0, 1.1)
    )
    settings = dataclasses.replace(settings_of(LEARNED), preprocess=preprocess)
    backbone, scan = network(LEARNED), volume()
    save_folder(tmp_path / "x", backbone, settings, ModelFacts("x"))
    assert "1.7 × own × 1.1 mm" in (tmp_path / "x" / "README.md").read_text(encoding="utf-8")
    processor = hub.AutoProcessor.from_pretrained(tmp_path / "x", trust_remote_code=True)
    inputs = processor(scan.hu_ZYX, spacing_mm=SPACING_MM)
    prepared = prepare(scan.hu_ZYX, CONTRACT, preprocess, LEARNED.patch, spacing_mm=SPACING_MM)
    found = inputs["pixel_values"][0, 0]
    torch.testing.assert_close(
        found, prepared.input_ZYX[tuple(map(slice, found.shape))], rtol=0, atol=1e-5
    )
    assert inputs["spacing_mm"][0].tolist() == pytest.approx(prepared.spacing_mm)
    model = hub.AutoModel.from_pretrained(tmp_path / "x", trust_remote_code=True)
    want = Pretrained(backbone, settings, {}).embed(scan)
    inputs.pop("spacing_mm")
    embedded = model.embed(**inputs)
    np.testing.assert_allclose(embedded.feature_map[0].numpy(), want.features_DZYX, atol=1e-5)
    with pytest.raises(ValueError, match="pass spacing_mm"):
        processor(scan.hu_ZYX)
    both = np.stack([scan.hu_ZYX, scan.hu_ZYX])[:, None]
    with pytest.raises(ValueError, match="have different spacings"):
        processor(both, spacing_mm=[SPACING_MM, (9.0, 0.8, 0.9)])


def test_windows_between_patches_give_the_features_of_tapct(hub: Any, tmp_path: Path) -> None:
    stride = tuple(side // 2 * 3 for side in LEARNED.patch)
    preprocess = dataclasses.replace(PREPROCESS, stride=stride, refine=(2, 2, 2))
    settings = dataclasses.replace(settings_of(LEARNED), preprocess=preprocess)
    backbone, scan = network(LEARNED), volume()
    save_folder(tmp_path / "x", backbone, settings, ModelFacts("x"))
    model = hub.AutoModel.from_pretrained(tmp_path / "x", trust_remote_code=True)
    processor = hub.AutoProcessor.from_pretrained(tmp_path / "x", trust_remote_code=True)
    found = model.embed(**processor(scan.hu_ZYX)).feature_map[0]
    want_DZYX = dense_features(backbone, scan.hu_ZYX, CONTRACT, preprocess).features_DZYX
    # tapct leaves out cells that lie behind the scan, in its last patch
    _, z, y, x = want_DZYX.shape
    torch.testing.assert_close(found[:, :z, :y, :x], want_DZYX, rtol=0, atol=1e-5)
    assert load_pretrained(tmp_path / "x").preprocess == preprocess


def test_two_scans_of_a_batch_are_embedded_as_one_by_one(both: Both) -> None:
    hu = np.stack([volume(seed).hu_ZYX[:2] for seed in (1, 2)])[:, None]
    inputs = both.processor(hu, spacing_mm=[SPACING_MM, (1.0, 1.0, 2.0)])
    together = both.model.embed(**inputs)
    for number in (0, 1):
        one = {name: value[number : number + 1] for name, value in inputs.items()}
        alone = both.model.embed(**one)
        torch.testing.assert_close(together.feature_map[number], alone.feature_map[0])
        torch.testing.assert_close(together.pooler_output[number], alone.pooler_output[0])


def test_a_saved_copy_gives_the_same_features(both: Both, hub: Any, tmp_path: Path) -> None:
    both.model.save_pretrained(tmp_path)
    both.processor.save_pretrained(tmp_path)
    for name in CODE_FILES:  # newer versions of transformers copy them themselves
        (tmp_path / name).write_text((both.folder / name).read_text())
    model = hub.AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    image_processor = hub.AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    inputs = image_processor(volume().hu_ZYX, spacing_mm=SPACING_MM)
    torch.testing.assert_close(
        model.embed(**inputs).feature_map, both.model.embed(**inputs).feature_map
    )


@pytest.fixture
def learned(hub: Any, tmp_path: Path) -> Path:
    write(tmp_path / "learned", "learned")
    return tmp_path / "learned"


def change_weights(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.blocks.1.attn.qkv.bias"), r"1 missing.*blocks\.1\.attn\.qkv\.bias"),
        (lambda s: s.pop("model.pos_embed"), r"missing.*pos_embed"),
        (lambda s: s.update({"model.extra": torch.zeros(2)}), r"unexpected.*extra"),
        (lambda s: s.update({"model.norm.weight": torch.zeros(3)}), r"norm\.weight|mismatch"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(
    learned: Path, hub: Any, change: Any, message: str
) -> None:
    change_weights(learned, change)
    with pytest.raises((ValueError, RuntimeError), match=message):
        hub.AutoModel.from_pretrained(learned, trust_remote_code=True)


def test_weights_of_another_shape_are_an_error_also_where_they_are_to_be_ignored(
    learned: Path, hub: Any
) -> None:
    change_weights(learned, lambda s: s.update({"model.norm.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"1 mismatched tensors, model\.norm\.weight"):
        hub.AutoModel.from_pretrained(learned, trust_remote_code=True, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_call_without_a_window_is_an_error(learned: Path, hub: Any, batch_size: int) -> None:
    model = hub.AutoModel.from_pretrained(learned, trust_remote_code=True)
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}; give at least 1"):
        model.embed(torch.zeros((1, 1, 4, 16, 24)), batch_size=batch_size)


def test_a_model_made_from_its_config_alone_is_initialised(learned: Path, hub: Any) -> None:
    config = hub.AutoConfig.from_pretrained(learned, trust_remote_code=True)
    state = hub.AutoModel.from_config(config, trust_remote_code=True).state_dict()
    assert all(value.isfinite().all() for value in state.values())
    assert 0.015 < float(state["model.blocks.0.attn.qkv.weight"].std()) < 0.025
    assert float(state["model.blocks.0.ls1.gamma"][0]) == pytest.approx(1e-5)


def test_wrong_input_is_an_error_that_names_the_shape(learned: Path, hub: Any) -> None:
    model = hub.AutoModel.from_pretrained(learned, trust_remote_code=True)
    processor = hub.AutoProcessor.from_pretrained(learned, trust_remote_code=True)
    for shape in ((4, 16, 24), (2, 4, 16, 24), (1, 2, 4, 16, 24), (1, 1, 3, 16, 24)):
        with pytest.raises(ValueError, match=r"pixel_values is \("):
            model(torch.zeros(shape))
    for shape in ((16, 24), (2, 4, 16, 24), (1, 3, 4, 16, 24), (0, 4, 4)):
        with pytest.raises(ValueError, match="the scan has the shape"):
            processor(np.zeros(shape, np.int16))
    with pytest.raises(ValueError, match="pixel_values is torch.int16"):
        model(torch.zeros((1, 1, 4, 16, 24), dtype=torch.int16))
    with pytest.raises(ValueError, match="no value below 0"):
        processor(np.arange(4 * 16 * 24).reshape(4, 16, 24))
    with pytest.raises(ValueError, match="NaN"):
        processor(np.full((4, 16, 24), np.nan))
    with pytest.raises(ValueError, match="before any normalisation"):
        processor(np.random.default_rng(0).random((4, 16, 24)))
    assert processor(np.zeros((3, 16, 24), ">u2"))["pixel_values"].shape == (1, 1, 4, 32, 40)


def test_a_model_in_mm_without_spacing_is_an_error(hub: Any, tmp_path: Path) -> None:
    write(tmp_path / "both", "both")
    model = hub.AutoModel.from_pretrained(tmp_path / "both", trust_remote_code=True)
    with pytest.raises(ValueError, match="pass spacing_mm"):
        model(torch.zeros(1, 1, 4, 16, 24))


@pytest.mark.slow  # test_free_sizes.py exports the network of tapct, which has the same rule
def test_torch_export_leaves_batch_depth_height_and_width_free(
    learned: Path, hub: Any, tmp_path: Path
) -> None:
    """Also after the program was written to a file and read again."""
    from torch.export import Dim

    model = hub.AutoModel.from_pretrained(learned, trust_remote_code=True)
    free = {0: Dim("b", max=64)}
    for axis, side in enumerate(LEARNED.patch):
        free[2 + axis] = side * Dim(f"n{axis}", min=2, max=64)
    crops = torch.randn(2, 1, 4, 12, 16)
    inputs = {"pixel_values": crops, "return_dict": False}
    shapes = {"pixel_values": free, "return_dict": None}
    written = torch.export.export(model, (), inputs, dynamic_shapes=shapes)
    torch.export.save(written, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for shape in ((2, 1, 4, 16, 24), (1, 1, 10, 8, 12), (3, 1, 6, 20, 8)):
        crops = torch.randn(shape)
        found = program(pixel_values=crops, return_dict=False)
        want = model(crops)
        for one, name in zip(found, ("last_hidden_state", "pooler_output"), strict=True):
            torch.testing.assert_close(one, want[name], rtol=0, atol=1e-5)


def test_the_code_of_the_folder_needs_torch_and_transformers_only(learned: Path) -> None:
    allowed = {"torch", "transformers", "numpy"}  # torch and transformers bring numpy along
    standard = {"__future__", "collections", "copy", "dataclasses", "itertools", "math", "typing"}
    for name in CODE_FILES:
        found = set()
        for node in ast.walk(ast.parse((learned / name).read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level and node.module
                found.add(node.module.split(".")[0])
        assert found <= allowed | standard, found


OTHER = {
    "window": (8, 16, 24), "patch": (4, 4, 4), "in_chans": 2, "dim": 48, "depth": 3, "heads": 4,
    "ffn": "swiglu", "qkv_bias": False, "qk_norm": True, "registers": 1, "layer_scale": None,
    "norm_eps": 1e-5, "pos_offset": 0.1, "positions": "both", "pos_resize": "linear",
}  # fmt: skip


def test_every_setting_that_changes_features_is_in_config_json() -> None:
    names = {field.name for field in dataclasses.fields(vit.Config)}
    assert names == OF_TRAINING | set(OTHER), "a new field: add it to transformers_config"
    plain = config_json(network(LEARNED), settings_of(LEARNED))
    for name, value in OTHER.items():
        changed = dataclasses.replace(LEARNED, **{name: value})
        assert config_json(vit.build(changed), settings_of(changed)) != plain, name


def test_every_setting_of_rotary_positions_is_in_config_json() -> None:
    other = {"coordinates": "voxel", "axes": "yx", "base": 7.0, "shortest": 3.0}
    names = {field.name for field in dataclasses.fields(rope.Config)}
    assert names == {"jitter", "rescale", *other}, "a new field: add it to transformers_config"
    config = dataclasses.replace(LEARNED, positions="rope")
    plain = config_json(vit.build(config), settings_of(config))
    for name, value in other.items():
        changed = dataclasses.replace(config, rope=rope.Config(**{name: value}))
        assert config_json(vit.build(changed), settings_of(changed)) != plain, name


def test_another_backbone_or_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be exported for transformers"):
        save_folder(tmp_path / "x", RawPatches((2, 4, 4)), settings_of(LEARNED), ModelFacts("x"))
    assert not (tmp_path / "x").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="give a new folder"):
        write(tmp_path / "mine", "learned")
    assert (tmp_path / "mine" / "thesis.tex").exists()
    write(tmp_path / "twice", "learned")
    write(tmp_path / "twice", "rope")
    assert json.loads((tmp_path / "twice" / "config.json").read_text())["positions"] == "rope"
    assert {path.name for path in (tmp_path / "twice").iterdir()} == {
        "README.md", "config.json", "metadata.json", "model.safetensors",
        "preprocessor_config.json", *CODE_FILES,
    }  # fmt: skip


def test_the_lines_of_the_card_read_a_scan_as_tapct_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_nifti(tmp_path / "scan.nii.gz", make_ct())
    exec(model_card.READ, {})
    np.testing.assert_array_equal(
        np.load("scan.npy").round(), read_volume(tmp_path / "scan.nii.gz").hu_ZYX
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_folder_comes_back_in_tapct(name: str, tmp_path: Path) -> None:
    own = write(tmp_path / name, name)
    back = load_pretrained(tmp_path / name)
    assert (back.contract, back.preprocess) == (CONTRACT, PREPROCESS)
    want = expected(own.model, SHAPES["deeper"])
    spacing_mm = [want.spacing_mm]
    found = back.model.tokens_of_blocks([want.crops], range(LEARNED.depth), spacing_mm)
    for block, patches in enumerate(want.patches):
        assert torch.equal(found[block][0].patches_BND, patches)


def test_other_ways_to_prepare_a_scan_come_back_in_tapct(tmp_path: Path) -> None:
    for number, changes in enumerate(
        (
            {"resize": "cubic"},
            {"clip": "after_resize"},
            {"pad": "raw"},
            {"size_yx": (0, 0)},
            {"spacing_mm": (4.0, 0.0, 1.5)},
        )
    ):
        preprocess = dataclasses.replace(PREPROCESS, **changes)  # type: ignore[arg-type]
        settings = dataclasses.replace(settings_of(LEARNED), preprocess=preprocess)
        folder = tmp_path / str(number)
        save_folder(folder, network(LEARNED), settings, ModelFacts("x"))
        assert load_pretrained(folder).preprocess == preprocess


def test_the_prefix_of_names_is_that_of_the_published_models(learned: Path) -> None:
    names = set(load_file(learned / "model.safetensors"))
    assert hf_folder.PREFIX == "model." and names == {
        f"model.{name}" for name in network(LEARNED).state_dict()
    }
