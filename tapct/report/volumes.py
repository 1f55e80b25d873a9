"""The viewer of a test scan: CT, label maps and feature colours in three planes, by one slider.

The voxels are pictures inside the page: all axial slices of an array as tiles of one picture, lossy
for the CT and lossless for label maps and colours. web/viewer.js cuts the planes from them.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tapct.eval.pictures import volumes
from tapct.eval.pictures.volumes import ScanVolume
from tapct.eval.results.json_file import Picture
from tapct.report.markup import text

QUALITY = 82  # of the CT
VOLUME_BYTES = 8_000_000  # of all viewers of a page, so that it stays below 15 MB
WINDOWS = {  # name -> centre and width in HU
    "soft tissue": (40, 400),
    "lung": (-600, 1500),
    "bone": (400, 1800),
}
MOST_SIDE = 16383  # pixels of WebP


def viewers(folder: Path, entries: Sequence[Picture], share: float = 1.0) -> str:
    """The viewers of some test scans.

    Args:
        folder: folder that `file` of each entry is relative to; a file outside it is not shown.
        entries: volumes of the evaluation.
        share: part of `VOLUME_BYTES` that these may take.
    """
    parts, left = [], share * VOLUME_BYTES
    for entry in entries:
        path = (folder / entry.file).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            missing = text(entry.file or "without a name")
            parts.append(f'<p class="missing">volume {missing} is not there</p>')
            continue
        try:
            html = _viewer(path, path.stat().st_mtime_ns)
        except (OSError, ValueError) as error:
            parts.append(f'<p class="missing">volume {text(entry.file)}: {text(error)}</p>')
            continue
        if len(html) > left:
            parts.append(
                f'<p class="missing">Scan {text(entry.scan)} is left out, so that the page stays '
                f"small; {text(entry.file)} holds its voxels.</p>"
            )
            continue
        left -= len(html)
        parts.append(html)
    return "".join(parts)


@functools.lru_cache(maxsize=8)
def _viewer(path: Path, changed_ns: int) -> str:
    """The viewer of one scan; kept for pages that are written again while a run trains.

    Args:
        path: file of the volume.
        changed_ns: time of its last change, so that a new file is read.
    """
    volume = volumes.read(path)
    scan = text(volume.scan)
    planes = ""
    for name in ("axial", "coronal", "sagittal"):
        checked = " checked" if name == "axial" else ""
        planes += (
            f'<label><input type="radio" name="plane-{scan}" value="{name}"{checked}> {name}'
            "</label>"
        )
    windows = "".join(f'<option value="{name}">{name}</option>' for name in WINDOWS)
    legend = ""
    for organ in _organs(volume):
        hatch = " hatched" if organ["hatched"] else ""
        legend += (
            f'<button type="button" class="organ" aria-pressed="true" data-organ="'
            f'{text(organ["name"])}"><i class="swatch{hatch}" style="background-color:'
            f'{organ["colour"]}"></i>{text(organ["name"].replace("_", " "))}</button>'
        )
    if legend:
        legend = f'<div class="organs">{legend}</div>'
    data = json.dumps(_content(volume), separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<figure class="viewer" aria-label="scan {scan}"><figcaption>Scan {scan}</figcaption>'
        f'<div class="controls"><fieldset><legend>plane</legend>{planes}</fieldset>'
        f'<label class="slice">slice <input type="range" class="position" min="0" max="0" '
        'value="0"></label><output class="where"></output>'
        f'<label>window <select class="window">{windows}</select></label></div>'
        f'<div class="panels"></div>{legend}'
        f'<script type="application/json">{data}</script></figure>'
    )


def _organs(volume: ScanVolume) -> list[dict[str, Any]]:
    """Organs that any label map of the scan has, once each."""
    found: dict[str, dict[str, Any]] = {}
    for organs in volume.organs:
        for organ in organs:
            shown = {"name": organ.name, "colour": organ.colour, "hatched": organ.hatched}
            found.setdefault(organ.name, shown)
    return list(found.values())


def _content(volume: ScanVolume) -> dict[str, Any]:
    """What web/viewer.js reads."""
    labels, features = [], []
    for layer, organs in zip(volume.labels, volume.organs, strict=True):
        drawn = [[one.index, one.name, one.colour, one.hatched] for one in organs]
        labels.append(
            {"title": layer.title, "organs": drawn, "array": _tiles(layer.classes_ZYX, lossy=False)}
        )
    for one in volume.features:
        array = _tiles(one.rgb_ZYXC, lossy=False)
        features.append({"title": one.title, "step": one.patches_per_voxel, "array": array})
    return {
        "shape": volume.levels_ZYX.shape,
        "spacing": volume.spacing_mm,
        "reduced": volume.step,
        "start": volume.start,
        "levels": volumes.LEVELS,
        "windows": WINDOWS,
        "ct": _tiles(volume.levels_ZYX, lossy=True),
        "body": _tiles(volume.body_ZYX, lossy=False),
        "labels": labels,
        "features": features,
    }


def _tiles(array: np.ndarray, *, lossy: bool) -> dict[str, Any]:
    """All axial slices of an array side by side in one picture.

    Args:
        array: uint8 (Z, Y, X), or (Z, Y, X, 3).
        lossy: whether small errors are allowed.
    Returns:
        The picture as a data URL, tiles per row, and the shape (Z, Y, X).
    """
    depth, height, width = array.shape[:3]
    columns = min(max(1, math.ceil(math.sqrt(depth * height / width))), MOST_SIDE // width)
    rows = math.ceil(depth / columns)
    sheet = np.zeros((rows * height, columns * width, *array.shape[3:]), np.uint8)
    for z in range(depth):
        top, left = z // columns * height, z % columns * width
        sheet[top : top + height, left : left + width] = array[z]
    buffer = io.BytesIO()
    picture = Image.fromarray(sheet)
    if lossy and max(picture.size) <= MOST_SIDE:
        picture.save(buffer, "WEBP", quality=QUALITY, method=4)
        mime = "image/webp"
    else:
        picture.save(buffer, "PNG", optimize=False, compress_level=9)
        mime = "image/png"
    url = f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"url": url, "columns": columns, "shape": [depth, height, width]}
