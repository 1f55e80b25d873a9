"""The viewer's voxels: reduced without a shift, written and read, and carried by the page."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tapct.eval.pictures import volumes
from tapct.eval.pictures.volumes import FeatureLayer, LabelLayer, ScanVolume
from tapct.eval.results.json_file import Picture
from tapct.report.volumes import viewers

SHAPE = (12, 20, 24)
NAMES = {2: "liver", 3: "kidney_right", 4: "kidney_left"}


def scan_with_sides() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A body with the liver on the patient's right, that is at small x; HU, body and classes."""
    hu_ZYX = np.full(SHAPE, -1000, np.int16)
    body_ZYX = np.zeros(SHAPE, bool)
    body_ZYX[:, 3:17, 2:22] = True
    hu_ZYX[body_ZYX] = 40
    classes_ZYX = np.where(body_ZYX, 1, 0).astype(np.uint16)
    for value, place in ((2, np.s_[2:9, 6:12, 3:9]), (3, np.s_[1:4, 12:15, 5:8])):
        classes_ZYX[place] = value
    classes_ZYX[1:4, 12:15, 16:19] = 4
    hu_ZYX[classes_ZYX > 1] = 120
    return hu_ZYX, body_ZYX, classes_ZYX


def volume_with_sides(scan: str = "s1") -> ScanVolume:
    hu_ZYX, body_ZYX, classes_ZYX = scan_with_sides()
    rgb_ZYXC = np.zeros((3, 4, 4, 3), np.uint8)
    rgb_ZYXC[..., 0] = np.linspace(0, 255, 4).astype(np.uint8)  # red grows to the patient's left
    return volumes.reduced(
        scan,
        hu_ZYX,
        body_ZYX,
        (3.0, 1.5, 1.5),
        labels=[LabelLayer("truth", classes_ZYX, NAMES)],
        features=[FeatureLayer("pretrained", rgb_ZYXC, (3 / 12, 4 / 20, 4 / 24))],
        colour_of={"liver": "#c96a4a", "kidney_right": "#f2c14e", "kidney_left": "#f29e4c"},
        start=(5, 8),
    )


def test_a_volume_is_read_as_it_was_written(tmp_path: Path) -> None:
    volume = volume_with_sides()
    volume.write(tmp_path / "pictures" / "s1_volume.npz")
    found = volumes.read(tmp_path / "pictures" / "s1_volume.npz")
    assert (found.scan, found.spacing_mm, found.start) == ("s1", (3.0, 1.5, 1.5), (5, 8, 12))
    assert found.organs == volume.organs and found.step == (1, 1, 1)
    np.testing.assert_array_equal(found.levels_ZYX, volume.levels_ZYX)
    np.testing.assert_array_equal(found.labels[0].classes_ZYX, volume.labels[0].classes_ZYX)
    np.testing.assert_array_equal(found.features[0].rgb_ZYXC, volume.features[0].rgb_ZYXC)
    assert [one.name for one in found.organs[0] if one.hatched] == ["kidney_left"]


@pytest.mark.parametrize("content", [b"", b"PK nonsense"])
def test_a_damaged_volume_is_an_error_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "v.npz"
    path.write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        volumes.read(path)
    np.savez(path, other=np.zeros(2))
    with pytest.raises(ValueError, match=r"v\.npz is no volume of an evaluation"):
        volumes.read(path)


def test_reducing_keeps_every_place_where_it_is() -> None:
    depth, height, width = 400, 9, 193
    z, y, x = np.meshgrid(np.arange(depth), np.arange(height), np.arange(width), indexing="ij")
    ramp = (x - 100).astype(np.int16)
    inside = (z >= 300) & (x >= 100)
    layers = [LabelLayer("truth", inside.astype(np.uint16), {1: "half"})]
    found = volumes.reduced("s", ramp, inside, (1.0, 2.0, 0.5), labels=layers)
    assert found.step == (3, 1, 2) and found.levels_ZYX.shape == (134, 9, 97)
    assert found.spacing_mm == (3.0, 2.0, 1.0)
    for i in (0, 40, 96):  # the mean of the voxels of each block, also of the cut one
        block = ramp[0, 0, 2 * i : 2 * i + 2]
        assert found.levels_ZYX[5, 5, i] == volumes.to_levels(np.array([block.mean()]))[0]
    steep = (10 * z - 900).clip(-1000, 1000).astype(np.int16)
    levels = volumes.reduced("s", steep, inside, (1.0, 1.0, 1.0)).levels_ZYX
    for i in (0, 50, 133):
        mean = steep[3 * i : 3 * i + 3].mean()
        assert (levels[i] == volumes.to_levels(np.array([mean]))[0]).all()
    classes = found.labels[0].classes_ZYX
    places = np.argwhere(classes)
    assert places[:, 0].min() in (99, 100) and places[:, 2].min() in (49, 50)


def test_levels_are_fine_in_soft_tissue_and_cover_all_hu() -> None:
    hu = np.arange(-1024, 3000)
    levels = volumes.to_levels(hu)
    known, level = zip(*volumes.LEVELS, strict=True)
    back = np.interp(levels, level, known)
    soft = (hu >= -160) & (hu <= 240)
    assert np.abs(back - hu)[soft].max() <= 1.25
    assert np.abs(back - hu)[(hu >= -1024) & (hu <= 1500)].max() <= 17
    assert (np.diff(levels.astype(int)) >= 0).all()


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("kidney_left", "left"),
        ("Parotid_L", "left"),
        ("lung right", "right"),
        ("Optic-Nerve-R", "right"),
        ("liver", ""),
        ("cleft", ""),
        ("Lens", ""),
    ],
)
def test_the_side_of_an_organ_is_a_word_of_its_name(name: str, side: str) -> None:
    assert volumes.side_of(name) == side


def test_more_classes_than_a_byte_holds_leave_the_label_map_out() -> None:
    hu_ZYX, body_ZYX, classes_ZYX = scan_with_sides()
    layers = [LabelLayer("truth", classes_ZYX * 100, {}), LabelLayer("few", classes_ZYX, NAMES)]
    found = volumes.reduced("s", hu_ZYX, body_ZYX, (1, 1, 1), labels=layers)
    assert [layer.title for layer in found.labels] == ["few"]


def content_of(html: str) -> dict[str, Any]:
    data = re.search(r'<script type="application/json">(.*?)</script>', html)
    assert data is not None
    found: dict[str, Any] = json.loads(data[1])
    return found


def voxels_of(array: dict[str, Any]) -> np.ndarray:
    """The array behind tiles, by another library than the browser."""
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(array["url"].split(",")[1]))))
    depth, height, width = array["shape"]
    slices = []
    for z in range(depth):
        top, left = z // array["columns"] * height, z % array["columns"] * width
        slices.append(picture[top : top + height, left : left + width])
    return np.stack(slices)


def test_the_tiles_of_a_page_hold_the_voxels(tmp_path: Path) -> None:
    volume = volume_with_sides()
    volume.write(tmp_path / "v.npz")
    content = content_of(viewers(tmp_path, [Picture("s1", "v.npz", "")]))
    labels = content["labels"][0]
    np.testing.assert_array_equal(voxels_of(labels["array"]), volume.labels[0].classes_ZYX)
    rgb = voxels_of(content["features"][0]["array"])
    np.testing.assert_array_equal(rgb, volume.features[0].rgb_ZYXC)
    ct = voxels_of(content["ct"])[..., 0].astype(int)  # lossy
    assert np.abs(ct - volume.levels_ZYX).mean() < 2
    assert {organ[1]: organ[3] for organ in labels["organs"]} == {
        "liver": False, "kidney_right": False, "kidney_left": True
    }  # fmt: skip


def test_volumes_from_outside_missing_or_too_large_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "eval"
    folder.mkdir()
    volume_with_sides().write(folder / "a.npz")
    volume_with_sides("s2").write(folder / "b.npz")
    volume_with_sides().write(tmp_path / "secret.npz")
    (folder / "bad.npz").write_bytes(b"no")
    entries = [Picture("s", file, "") for file in ("../secret.npz", "no.npz", "bad.npz")]
    html = viewers(folder, entries)
    assert html.count("is not there") == 2 and "volume bad.npz" in html and "<figure" not in html
    both = [Picture("s1", "a.npz", ""), Picture("s2", "b.npz", "")]
    assert viewers(folder, both).count("<figure") == 2
    monkeypatch.setattr("tapct.report.volumes.VOLUME_BYTES", 1.5 * len(viewers(folder, both[:1])))
    html = viewers(folder, both)
    assert html.count("<figure") == 1 and "Scan s2 is left out" in html
