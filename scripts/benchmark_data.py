"""Data of the benchmark: from a folder in nnU-Net layout, or a synthetic archive, to a store, and
the division of its people.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from tapct.base import console
from tapct.base.exits import UserError
from tapct.base.files import write_atomically
from tapct.data import manifest as manifests
from tapct.data.index.build import build_manifest
from tapct.data.packed import pack
from tapct.data.packed.store import Store
from tapct.data.patients import key as patient_key
from tapct.data.patients import split
from tapct.data.phantom import archive as phantom

SHORT_SHARE = 1 / 3  # of the people is tested in the short form
# pairs of scans for matching and registration, all phases; coarse, so that it takes seconds
PHANTOM = phantom.Config(
    num=60,
    slices=(32, 64),
    in_plane=(128, 160),
    slice_mm=(3.0, 5.0),
    dicom_share=0.0,
    followup_share=0.5,
    warp_mm=10.0,
)


@dataclass(frozen=True)
class Fold:
    """One group of test people.

    Args:
        number: number of the group.
        start: `data.held_out_start`.
        share: `data.held_out`.
    """

    number: int
    start: float
    share: float


def divided(people: Sequence[str], num: int) -> tuple[list[Fold], int]:
    """The groups of test people, and the seed of the split that they need.

    Args:
        people: patients.
        num: number of groups; 1 is the short form.
    Raises:
        UserError: there are too few people.
    """
    share = SHORT_SHARE if num == 1 else 1 / num
    seed = seed_of_folds(people, share, num)
    if seed is None:
        raise UserError(f"{len(people)} people cannot be divided; the benchmark needs several")
    return [Fold(number, number * share, share) for number in range(num)], seed


def seed_of_folds(people: Sequence[str], share: float, num: int) -> int | None:
    """A seed of the split with which every fold has test people and training people.

    An evaluation without held-out people would test on people of pretraining.

    Args:
        people: patients.
        share: share of the people in one fold.
        num: number of folds.
    Returns:
        None where none of the first hundred seeds has.
    """

    def has_both_sides(seed: int) -> bool:
        counts = [
            len(split.patients_below(people, share, seed, number * share)) for number in range(num)
        ]
        return all(0 < count < len(people) for count in counts)

    nearest = split.seed_with_both_sides(people, share)
    seeds = [] if nearest is None else [nearest, *range(100)]
    return next((seed for seed in seeds if has_both_sides(seed)), None)


def indexed(data: Path | phantom.Config, work: Path) -> manifests.Manifest:
    """Index the folder, or make a synthetic archive and index it.

    Args:
        data: nnU-Net folder, or a synthetic archive.
        work: folder of the manifest.
    Raises:
        UserError: the folder has no images or no labels, or the archive that is there is another
            one.
    """
    work.mkdir(parents=True, exist_ok=True)
    if not (work / patient_key.KEY_FILE).exists():
        # a public key makes every machine divide the people of a public data set alike
        key = hashlib.blake2b(b"tapct benchmark", digest_size=32).digest()
        (work / patient_key.KEY_FILE).write_bytes(key)
    labels: Path | None = None
    regex: str | None = None
    if isinstance(data, phantom.Config):
        images, regex = work / "phantom", r"(P\d+)_T\d"
        make_phantom(images, data)
    else:
        images, labels = data / "imagesTr", data / "labelsTr"
        for folder in (images, labels):
            if not folder.is_dir():
                raise UserError(f"{folder} is missing; an nnU-Net folder has imagesTr and labelsTr")
    with console.progress_bar("index") as progress:
        found = build_manifest(
            images,
            work / "manifest.parquet",
            labels=labels,
            patient_regex=regex,
            workers=os.cpu_count() or 1,
            progress=progress,
        )
    for row in found.rows:
        if row.status != "accepted":
            console.say_line(f"refused {row.path}: {row.reason}: {row.detail}")
    return found


def make_phantom(archive: Path, config: phantom.Config) -> None:
    """Write the archive unless it exists.

    Args:
        archive: its folder.
        config: its settings.
    Raises:
        UserError: it exists with other settings.
    """
    done = archive / "phantom.json"
    facts = json.loads(json.dumps(asdict(replace(config, workers=0))))
    if done.is_file():
        known = json.loads(done.read_text())
        if known != facts:
            raise UserError(f"{archive} was made with other settings; remove it, or give an --out")
        return
    with console.progress_bar("phantom") as progress:
        phantom.write(archive, config, progress)
    write_atomically(done, json.dumps(facts))


def without_test_people(found: manifests.Manifest, file: Path) -> manifests.Manifest:
    """The manifest without the people whom the short form of the benchmark tests, so that a recipe
    that is chosen on the others has not seen them.

    Args:
        found: manifest of all people.
        file: file of the manifest of the others.
    """
    people = sorted({row.patient for row in found.accepted})
    (fold,), split_seed = divided(people, 1)
    tested = split.patients_below(people, fold.share, split_seed, fold.start)
    rows = tuple(row for row in found.rows if row.patient not in tested)
    others = replace(found, rows=rows, file=file)
    manifests.write_table(others, file)
    console.say_line(
        f"validation: {len(tested)} test people are left out; {len(people) - len(tested)} others "
        "are divided"
    )
    return others


def packed(found: manifests.Manifest, store: Path) -> Path:
    """Pack the scans of a manifest; what is packed already is kept, what it lacks is dropped.

    Args:
        found: manifest.
        store: folder of the store.
    """
    with console.progress_bar("pack") as progress:
        pack.pack(
            found,
            store,
            workers=os.cpu_count() or 1,
            level=1,
            drop_missing=True,
            progress=progress,
        )  # fmt: skip
    return store


def truth_tables(
    data: Path | phantom.Config, work: Path, found: manifests.Manifest, store: Path
) -> list[str]:
    """Overrides that name the truth of whole scans and landmarks.

    The phantom writes both. For other folders, the volume of each organ in the label map is the
    truth of the scan, which a decoder of the whole scan should find without seeing the labels.

    Args:
        data: nnU-Net folder, or a synthetic archive.
        work: folder of the store.
        found: manifest of the scans.
        store: packed scans and labels.
    """
    if isinstance(data, phantom.Config):
        return [
            f"eval.scan_labels={work / 'phantom' / 'scan_labels.csv'}",
            f"eval.landmarks={work / 'phantom' / 'landmarks.csv'}",
        ]
    scans = Store(store)
    volumes: dict[str, dict[str, float]] = {}
    for row in found.accepted:
        index = scans.index_of(row.id)
        scan = scans.scans[index]
        if not scan.has_labels:
            continue
        labels = scans.read_labels(index)
        counts = np.bincount(labels.labels_ZYX.reshape(-1))
        millilitres = float(np.prod(scan.spacing_mm)) / 1000
        volumes[row.path] = {
            f"{name} ml": round(float(counts[value]) * millilitres, 3)
            for value, name in labels.names
            if 0 < value < len(counts) and counts[value]
        }
    columns = sorted({name for row in volumes.values() for name in row})
    file = work / "scan_labels.csv"
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, ["path", *columns])
        writer.writeheader()
        for path, values in volumes.items():
            writer.writerow({"path": path, **values})
    return [f"eval.scan_labels={file}"]
