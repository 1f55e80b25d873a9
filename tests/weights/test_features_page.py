"""The examples of docs/features.md run unchanged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scan_files import make_ct, write_nifti
from shell import leave_code
from tiny_export import tiny_export

from tapct.run.embed.vector_table import SCHEMA

PAGE = Path(__file__).resolve().parents[2] / "docs" / "features.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
SHAPE = (9, 24, 28)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Name of each example -> its variables, all run in one folder after the commands."""
    work = tmp_path_factory.mktemp("page")
    tiny_export(work / "models" / "mine")
    write_nifti(work / "scan.nii.gz", make_ct(SHAPE))
    for number in range(2):
        folder = work / "scans" / "2021" / f"P00{number + 1}"
        folder.mkdir(parents=True)
        write_nifti(folder / "ct.nii.gz", make_ct(SHAPE, number))
    found: dict[str, dict[str, Any]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        (table,) = re.findall(r"^((?:    .*\n)*    path,id,label\n(?:    .*\n)+)", TEXT, re.M)
        rows = "".join(line.removeprefix("    ") + "\n" for line in table.splitlines())
        Path("scans/scans.csv").write_text(rows)
        for line in re.findall(r"^    (tapct embed MODEL .*?)(?:  +#.*)?$", TEXT, re.M):
            words = line.replace("MODEL", "models/mine").split()[1:]
            words = ["scans/scans.csv" if word == "scans.csv" else word for word in words]
            assert leave_code(patch, *words) == 0, words
        for name, code in BLOCKS:
            names: dict[str, Any] = {"__name__": "__main__"}
            exec(compile(code, name, "exec"), names)
            found[name] = names
    return found


def test_the_table_of_the_commands_is_read(results: dict[str, dict[str, Any]]) -> None:
    names = results["table.py"]
    # the folder, whose files have one name, and the CSV file
    assert names["ids"] == ["2021_P001_ct", "2021_P002_ct", "P001", "P002"]
    assert names["vectors"].shape == (4, 16)
    columns = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| \w", TEXT, re.M)
    listed = [name for names in columns for name in re.findall(r"`(\w+)`", names)]
    assert [name for name in listed if name in SCHEMA.names] == SCHEMA.names


def test_the_examples_in_python_give_what_their_comments_say(
    results: dict[str, dict[str, Any]],
) -> None:
    features = results["features.py"]["features"]
    assert features.features_DZYX.dtype == np.float32
    assert features.centres_mm.shape == (*features.features_DZYX.shape[1:], 3)
    block = results["blocks.py"]["features"].block
    assert block[-1] is results["blocks.py"]["features"].features_DZYX
    voxels = results["voxels.py"]
    assert voxels["middle"].shape == (8, *SHAPE[1:]) and voxels["one"].shape == (8,)
    assert voxels["end"] == SHAPE[0]
    crops = results["crops.py"]
    assert [one.shape for one in crops["maps"]] == [(1, 8, 1, 2, 2)] * 2
    assert crops["pairs"][0][1].shape == (1, 8)
