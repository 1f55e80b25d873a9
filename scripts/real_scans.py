"""Lay out the labelled public scans of a folder so that one evaluation reads them: three people
whose lungs are labelled, one of them with a crop of the scan (docs/benchmarks.md, "Real scans").

OUT/imagesTr, OUT/labelsTr and OUT/dataset.json hold scans and labels in the layout of nnU-Net;
OUT/split.csv is the official split: the person with two scans is tested.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import arguments
import numpy as np
import SimpleITK

from tapct.base.exits import UserError

LUNG = 10  # the value of a lung lobe in the labels of ts_body
LOBES = (10, 11, 12, 13, 14)
# name -> scan, its labels, side of the split
SCANS = {
    "chest": ("cip_chest/ct-64.nrrd", "cip_chest/lm-64.nrrd", "train"),
    "hemithorax": (
        "elastix_lung/3DCT_lung.nrrd",
        "elastix_lung/3DCT_lung_baseline_mask.nrrd",
        "train",
    ),
    "body": ("ts_body/example_ct.nii.gz", "ts_body/example_ct_seg62.nii.gz", "test"),
    "body_crop": ("ts_body/example_ct_sm.nii.gz", "ts_body/example_seg.nii.gz", "test"),
}


def lung_labels(name: str, labels_ZYX: np.ndarray) -> np.ndarray:
    """Labels in which one value is the lung; those of the body keep their other organs.

    Args:
        name: name of the scan.
        labels_ZYX: its labels as they are.
    """
    if name == "chest":  # the low byte is the region, 9 to 14 are thirds of a lung
        is_lung = (labels_ZYX & 255 >= 9) & (labels_ZYX & 255 <= 14)
    elif name == "hemithorax":
        is_lung = labels_ZYX == 1
    else:
        return np.where(np.isin(labels_ZYX, LOBES), LUNG, labels_ZYX).astype(np.uint16)
    return np.where(is_lung, LUNG, 0).astype(np.uint16)


def lay_out(ct: Path, out: Path) -> None:
    """Write the scans, their labels and the split.

    Raises:
        UserError: a file is missing.
    """
    for folder in ("imagesTr", "labelsTr"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    values: set[int] = set()
    for name, (scan, labels, _) in SCANS.items():
        for file in (scan, labels):
            if not (ct / file).is_file():
                raise UserError(f"{ct / file} is not there; give the folder of the public scans")
        image = SimpleITK.ReadImage(str(ct / scan))
        SimpleITK.WriteImage(image, str(out / "imagesTr" / f"{name}_0000.nii.gz"))
        labels_ZYX = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(ct / labels)))
        found = SimpleITK.GetImageFromArray(lung_labels(name, labels_ZYX))
        found.CopyInformation(image)
        SimpleITK.WriteImage(found, str(out / "labelsTr" / f"{name}.nii.gz"))
        values |= {*np.unique(SimpleITK.GetArrayViewFromImage(found)).tolist()}
    names = {"background": 0, "lung": LUNG}
    names |= {f"organ {value}": value for value in sorted(values - {0, LUNG})}
    facts = {"channel_names": {"0": "CT"}, "labels": names, "numTraining": len(SCANS)}
    (out / "dataset.json").write_text(json.dumps({**facts, "file_ending": ".nii.gz"}, indent=1))
    with (out / "split.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "split", "patient"])
        for name, (_, _, side) in SCANS.items():
            path = f"imagesTr/{name}_0000.nii.gz"
            rows.writerow([path, side, name.removesuffix("_crop")])


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="scripts/real_scans.py", description=__doc__)
    parser.add_argument("ct", type=Path, help="folder of the public scans")
    parser.add_argument("out", type=Path, help="folder to write")
    options = parser.parse_args(words)
    lay_out(options.ct, options.out)


if __name__ == "__main__":
    arguments.run(main)
