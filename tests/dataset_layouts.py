"""Public data sets laid out as they are unpacked, with tiny scans: their files and what they mean.

Label values, sides and patients are written down here a second time, by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK
from scan_files import noise_ct, save_scan

SHAPE = (6, 24, 26)


@dataclass(frozen=True)
class Layout:
    """Files of a data set, and what they mean.

    Args:
        scans: scan -> its label map, or folder of masks, or "".
        values: label values in every label map, or names of masks -> name in the store.
        sides: scan -> side of the official split.
        patients: number of patients of the scans.
        tables: file -> text.
        others: further scan files, which do not belong to the data set.
        targets: scan -> target -> value, of some targets.
    """

    scans: Mapping[str, str]
    values: Mapping[int | str, str]
    sides: Mapping[str, str] = field(default_factory=dict)
    patients: int = 4
    tables: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    targets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def numbered(scan: str, mask: str, numbers: tuple[int, ...]) -> dict[str, str]:
    return {scan.format(number): mask.format(number) for number in numbers}


def msd(stem: str, values: Mapping[int | str, str]) -> Layout:
    pair = (f"imagesTr/{stem}_{{}}.nii.gz", f"labelsTr/{stem}_{{}}.nii.gz")
    return Layout(numbered(*pair, (1, 12, 103, 7)), values, others=(f"imagesTs/{stem}_2.nii.gz",))


TOTAL = numbered("s{:04d}/ct.nii.gz", "s{:04d}/segmentations", (0, 3, 11, 250))
TOTAL_TABLE = "image_id;age;split\ns0000;50;train\ns0003;;val\ns0011;70;test\ns0250;9;train\n"
TOTAL_SIDES = dict(zip(TOTAL, ("train", "val", "test", "train")))
SERIES = [f"1.3.6.1.4.1.14519.5.2.1.6279.6001.10{number}" for number in range(4)]
RATE = [
    "train_fixed/train_1/train_1_a/train_1_a_1.nii.gz",
    "train_fixed/train_1/train_1_a/train_1_a_2.nii.gz",
    "train_fixed/train_20/train_20_b/train_20_b_1.nii.gz",
    "valid_fixed/valid_1/valid_1_a/valid_1_a_1.nii.gz",
]
LAYOUTS = {
    "amos22": Layout(
        {
            **numbered("imagesTr/amos_{:04d}.nii.gz", "labelsTr/amos_{:04d}.nii.gz", (1, 4, 38)),
            **numbered("imagesVa/amos_{:04d}.nii.gz", "labelsVa/amos_{:04d}.nii.gz", (8,)),
        },
        {1: "spleen", 6: "liver", 15: "prostate or uterus"},
        {
            "imagesTr/amos_0001.nii.gz": "train",
            "imagesTr/amos_0004.nii.gz": "train",
            "imagesTr/amos_0038.nii.gz": "train",
            "imagesVa/amos_0008.nii.gz": "test",
        },
        others=("imagesTr/amos_0507.nii.gz", "imagesTs/amos_0002.nii.gz"),
    ),
    "btcv": Layout(
        numbered(
            "Training/img/img{:04d}.nii.gz", "Training/label/label{:04d}.nii.gz", (1, 2, 10, 40)
        ),
        {1: "spleen", 10: "portal vein and splenic vein", 13: "left adrenal gland"},
        others=("Testing/img/img0061.nii.gz",),
    ),
    "msd-liver": msd("liver", {1: "liver", 2: "tumour"}),
    "msd-lung": msd("lung", {1: "cancer"}),
    "msd-pancreas": msd("pancreas", {1: "pancreas", 2: "cancer"}),
    "msd-hepatic-vessel": msd("hepaticvessel", {1: "vessel", 2: "tumour"}),
    "msd-spleen": msd("spleen", {1: "spleen"}),
    "msd-colon": msd("colon", {1: "colon cancer primaries"}),
    # the values are those of the class map, and not the order of the files
    "totalsegmentator": Layout(
        TOTAL,
        {"spleen": "1", "aorta": "52", "rib_left_1": "92", "costal_cartilages": "117"},
        TOTAL_SIDES,
        tables={"meta.csv": TOTAL_TABLE},
    ),
    "totalsegmentator-v1": Layout(
        TOTAL,
        {"spleen": "1", "aorta": "7", "face": "93", "urinary_bladder": "104"},
        TOTAL_SIDES,
        tables={"meta.csv": TOTAL_TABLE},
    ),
    "lits17": Layout(
        {
            **numbered(
                "Training Batch 1/volume-{}.nii", "Training Batch 1/segmentation-{}.nii", (0, 27)
            ),
            **numbered(
                "Training Batch 2/volume-{}.nii", "Training Batch 2/segmentation-{}.nii", (28, 130)
            ),
        },
        {1: "liver", 2: "tumour"},
        others=("test-volume-0.nii",),
    ),
    "kits23": Layout(
        numbered(
            "case_{:05d}/imaging.nii.gz", "case_{:05d}/segmentation.nii.gz", (0, 21, 299, 588)
        ),
        {1: "kidney", 2: "tumor", 3: "cyst"},
    ),
    "flare22": Layout(
        numbered(
            "images/FLARE22_Tr_{:04d}_0000.nii.gz", "labels/FLARE22_Tr_{:04d}.nii.gz", (1, 2, 9, 50)
        ),
        {1: "liver", 5: "aorta", 13: "left kidney"},
    ),
    "word": Layout(
        {
            **numbered("imagesTr/word_{:04d}.nii.gz", "labelsTr/word_{:04d}.nii.gz", (2, 5)),
            **numbered("imagesVal/word_{:04d}.nii.gz", "labelsVal/word_{:04d}.nii.gz", (1,)),
            **numbered("imagesTs/word_{:04d}.nii.gz", "labelsTs/word_{:04d}.nii.gz", (14,)),
        },
        {1: "liver", 11: "intestine", 16: "right head of femur"},
        {
            "imagesTr/word_0002.nii.gz": "train",
            "imagesTr/word_0005.nii.gz": "train",
            "imagesVal/word_0001.nii.gz": "val",
            "imagesTs/word_0014.nii.gz": "test",
        },
    ),
    "ct-rate": Layout(
        dict.fromkeys(RATE, ""),
        {},
        dict(zip(RATE, ("train", "train", "train", "test"))),
        patients=3,
        tables={
            "multi_abnormality_labels/train_predicted_labels.csv": (
                "VolumeName,Emphysema,Lung nodule\ntrain_1_a_1.nii.gz,1,0\n"
                "train_1_a_2.nii.gz,1,0\ntrain_20_b_1.nii.gz,0,1\ntrain_9_a_1.nii.gz,0,1\n"
            ),
            "multi_abnormality_labels/valid_predicted_labels.csv": (
                "VolumeName,Emphysema,Lung nodule\nvalid_1_a_1.nii.gz,0,0\n"
            ),
        },
        others=("train/train_1/train_1_a/train_1_a_1.nii.gz",),
        targets={RATE[1]: {"Emphysema": "1", "Lung nodule": "0"}, RATE[3]: {"Emphysema": "0"}},
    ),
    "luna16": Layout(
        {
            f"subset{number}/{series}.mhd": f"seg-lungs-LUNA16/{series}.mhd"
            for number, series in enumerate(SERIES)
        },
        {3: "lung (3)", 5: "trachea"},
        tables={
            "annotations.csv": "seriesuid,coordX,coordY,coordZ,diameter_mm\n"
            f"{SERIES[1]},1.5,2.5,-3,5.1\n{SERIES[1]},8,2,-3,4.1\n"
        },
        targets={f"subset{n}/{SERIES[n]}.mhd": {"nodule": str(int(n == 1))} for n in range(4)},
    ),
    "cvpr26-amos": Layout(
        numbered("images/amos_{:04d}.nii.gz", "totalseg/amos_{:04d}.nii.gz", (1, 4, 38, 8)),
        {1: "spleen", 5: "liver", 117: "costal_cartilages"},
        {
            "images/amos_0001.nii.gz": "train",
            "images/amos_0004.nii.gz": "val",
            "images/amos_0038.nii.gz": "test",
        },
        tables={
            "labels/ascites.csv": "case_id,ascites,split\namos_0001.nii.gz,0,train\n"
            "amos_0004.nii.gz,1,val\n",
            "labels/gallstone.csv": "case_id,gallstone,split\namos_0001.nii.gz,1,train\n"
            "amos_0038.nii.gz,0,test\n",
        },
        targets={"images/amos_0001.nii.gz": {"ascites": "0", "gallstone": "1"}},
    ),
}


def write_scan(path: Path, values_ZYX: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mhd":
        image = SimpleITK.GetImageFromArray(values_ZYX)
        image.SetSpacing((0.8, 0.7, 2.0))
        SimpleITK.WriteImage(image, str(path))
    else:
        save_scan(path, values_ZYX)


def lay_out(layout: Layout, root: Path) -> Path:
    """Write the files of a data set; every scan has other voxels."""
    for seed, path in enumerate([*layout.scans, *layout.others]):
        write_scan(root / path, noise_ct(seed))
    for mask in filter(None, layout.scans.values()):
        if isinstance(next(iter(layout.values)), str):
            for number, name in enumerate(layout.values):
                one = np.zeros(SHAPE, np.uint8)
                one[1:4, 3 * number : 3 * number + 2, 4:9] = 1
                write_scan(root / mask / f"{name}.nii.gz", one)
            continue
        labels = np.zeros(SHAPE, np.uint8)
        for number, value in enumerate(layout.values):
            labels[1:4, 3 * number : 3 * number + 2, 4:9] = value
        write_scan(root / mask, labels)
    for file, text in layout.tables.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    return root
