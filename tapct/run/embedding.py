"""One vector per scan, in the files that the CVPR 2026 challenge on CT diagnosis reads.

    OUT/CASE_ID.h5    dataset `y_hat`: float32 (channels,); attributes: what it was made with

A second call computes only the vectors that are missing, and those whose scan or mask has changed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from tapct.base import console, files
from tapct.base.counted import counted
from tapct.base.exits import Incomplete, UserError, single_line
from tapct.data.index.share import WHOLE, Share
from tapct.data.labels.reading import read_labels_of
from tapct.data.scans.ingest import read_source
from tapct.eval.cache import Config as CacheConfig
from tapct.eval.cache import FeatureCache, model_key
from tapct.eval.one_scan import ScanEncoder
from tapct.eval.organ_classes import is_called
from tapct.eval.scans import LabelledScan
from tapct.eval.vectors import (
    BLOCKS,
    PARTS,
    blocks_to_read,
    organ_shares,
    scan_vectors,
)
from tapct.run.named_scans import NamedScan, find_cases
from tapct.types import IGNORE_LABEL, LabelMap, Refused, Volume
from tapct.weights.pretrained import Pretrained

DATASET, ATTRIBUTE, SUFFIX = "y_hat", "tapct", ".h5"
MASK = "mask"
DEFAULT_VECTOR = "cls_mean"
_ORGAN = "organ"  # name of the label into which the chosen labels of a mask are joined
MOST_NAMES = 12


@dataclass(frozen=True)
class VectorChoice:
    """What is computed of each scan.

    Args:
        vector: one of `vectors.PARTS`, or `mask`, the mean of the patches in a mask.
        block: one of `vectors.BLOCKS`.
        organs: labels, by name or value, that make the mask; empty for all labels.
    """

    vector: str = DEFAULT_VECTOR
    block: str = "last"
    organs: tuple[str, ...] = ()

    @classmethod
    def of(cls, vector: str, block: str, organs: Sequence[str], has_masks: bool) -> VectorChoice:
        """Check the options.

        Args:
            vector: option --vector; empty for the default.
            block: option --block.
            organs: option --organ.
            has_masks: whether --masks is given.
        Raises:
            UserError: a name is unknown, or options contradict each other.
        """
        vector = vector or (MASK if has_masks else DEFAULT_VECTOR)
        known = ", ".join((*PARTS, MASK))
        if vector not in (*PARTS, MASK):
            raise UserError(f"--vector {vector}: must be one of {known}")
        if block not in BLOCKS:
            raise UserError(f"--block {block}: must be one of {', '.join(BLOCKS)}")
        if (vector == MASK) != has_masks:
            raise UserError(
                f"--vector {vector} and --masks do not fit: with --masks DIR, the patches in a "
                "mask are pooled (--vector mask); without it, choose another vector"
            )
        if organs and not has_masks:
            raise UserError(f"--organ {organs[0]} names a label of the masks; give --masks DIR")
        return cls(vector, block, tuple(organs))


def encoder_of(
    pretrained: Pretrained, device: torch.device, cache: Path | None = None
) -> ScanEncoder:
    """The model of an export, ready to compute features.

    Args:
        pretrained: model on `device`.
        device: device of the model.
        cache: folder of a feature cache; None for none.
    """
    key = model_key(pretrained.model, pretrained.contract, pretrained.preprocess, device)
    return ScanEncoder(
        pretrained.model,
        key,
        pretrained.contract,
        pretrained.preprocess,
        device,
        None if cache is None else FeatureCache(cache, CacheConfig().quota_gb),
    )


def embed_cases(
    encoder: ScanEncoder,
    given: Path,
    out: Path,
    wanted: VectorChoice,
    *,
    root: Path | None = None,
    masks: Path | None = None,
    share: Share = WHOLE,
) -> int:
    """Write one vector per scan; a scan that cannot be used is named, and the others are written.

    Args:
        encoder: model.
        given: folder of scans, or CSV file of case IDs.
        out: folder to write.
        wanted: vector.
        root: folder of the scans that a CSV file names.
        masks: folder of the label maps.
        share: scans whose vectors this process computes, for several that compute at once.
    Returns:
        Number of vectors in `out` of these scans.
    Raises:
        Incomplete: some scans have no vector.
        UserError: nothing can be written, or `out` holds vectors of another model or kind.
    """
    h5py = load_h5py()
    files.check_new_path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give the folder for the {SUFFIX} files")
    cases = find_cases(given, root, masks).of_share(share)
    made_with = _made_with(encoder, wanted)
    done = {case.id for case in cases.found if _is_done(h5py, out, case, made_with)}
    problems = dict.fromkeys(cases.missing, "no scan has this name")
    todo = [case for case in cases.found if case.id not in done]
    if done:
        console.say(f"{counted(len(done), 'vector')} in {out} from an earlier call")
    with console.progress_bar("embed") as progress, encoder.using_cache():
        for number, case in enumerate(todo, 1):
            file, stamp = out / f"{case.id}{SUFFIX}", case.stamp()
            try:
                vector_D = vector_of(encoder, case, wanted)
                _write(h5py, file, vector_D, {**made_with, "stamp": stamp})
            except Refused as error:
                problems[case.id] = f"{error.reason}: {error.detail}"
                file.unlink(missing_ok=True)  # the vector of an earlier version of its scan
            progress(number, len(todo))
    for name, problem in problems.items():
        console.say_line(f"no vector of {name}: {single_line(problem)}")
    if problems:
        raise Incomplete(_missing_line(problems, len(cases.found) + len(cases.missing), out))
    return len(cases.found)


def load_h5py() -> ModuleType:
    """The library that writes .h5 files.

    Raises:
        UserError: it is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise UserError(
            "--format cvpr26 writes .h5 files with h5py, which cannot be loaded; install it with "
            "`pip install 'tapct[eval]'`"
        ) from error
    return h5py


def vector_of(encoder: ScanEncoder, case: NamedScan, wanted: VectorChoice) -> np.ndarray:
    """The vector of one scan: float32 (channels,).

    Args:
        encoder: model.
        case: scan and mask.
        wanted: vector.
    Raises:
        Refused: the scan or its mask cannot be used.
    """
    volume = read_source(case.source)
    blocks = blocks_to_read([wanted.block], encoder.num_blocks)
    if wanted.vector != MASK:
        dense = encoder.features(volume, blocks)
        found = scan_vectors(dense, [wanted.vector], [wanted.block])
        vector_D = found.vector(wanted.vector, wanted.block)
        if vector_D is None:
            raise UserError(
                f"--vector {wanted.vector}: this model has no registers; choose another one"
            )
        return _checked(vector_D)
    mask = mask_of(case, volume, wanted.organs)
    dense = encoder.features(volume, blocks)
    name = f"{MASK}:{_ORGAN}"
    shares = organ_shares(LabelledScan(case.id, volume, mask), dense.grid, [name])
    vector_D = scan_vectors(dense, [name], [wanted.block], shares=shares).vector(name, wanted.block)
    assert vector_D is not None, "a mask is pooled without registers"
    return _checked(vector_D)


def _checked(vector_D: np.ndarray) -> np.ndarray:
    """A vector as it is written.

    Raises:
        Refused: it is not finite.
    """
    if not np.isfinite(vector_D).all():
        raise Refused("not_finite", "its vector is not finite; check the weights")
    vector: np.ndarray = vector_D.astype(np.float32)
    return vector


def mask_of(case: NamedScan, volume: Volume, organs: Sequence[str]) -> LabelMap:
    """The mask of a scan: its chosen labels, joined into one.

    Args:
        case: scan and mask.
        volume: the scan.
        organs: names or values of labels; empty for all.
    Raises:
        Refused: there is no mask, it does not lie on the grid of the scan, or it is empty.
    """
    if case.mask is None:
        raise Refused("not_labels", "no label map in the folder of --masks has its name")
    labels = read_labels_of(volume, case.mask).label_map
    names = dict(labels.names)
    present = [int(value) for value in np.unique(labels.labels_ZYX) if 0 < value < IGNORE_LABEL]
    chosen = [
        value
        for value in present
        if not organs or is_called(value, names.get(value, f"label {value}"), organs)
    ]
    if not chosen:
        words = " or ".join(organs) if organs else "label"
        raise Refused("not_labels", f"its label map has no voxel of {words}")
    joined_ZYX = np.isin(labels.labels_ZYX, chosen).astype(np.uint16)
    return replace(labels, labels_ZYX=joined_ZYX, names=((1, _ORGAN),))


def _made_with(encoder: ScanEncoder, wanted: VectorChoice) -> dict[str, Any]:
    """What a vector depends on beside its scan."""
    return {
        "model": encoder.key.text,
        "vector": wanted.vector,
        "block": wanted.block,
        "organs": sorted(wanted.organs),
        "cached": encoder.cache is not None,  # features in the cache are rounded to 16 bits
    }


def _is_done(h5py: ModuleType, out: Path, case: NamedScan, made_with: dict[str, Any]) -> bool:
    """Whether a vector is there and up to date.

    Raises:
        UserError: it was made with another model or is of another kind.
    """
    file = out / f"{case.id}{SUFFIX}"
    if not file.exists():
        return False
    try:
        with h5py.File(file, "r") as opened:
            facts = json.loads(opened.attrs[ATTRIBUTE])
            is_whole = opened[DATASET].ndim == 1
    except (OSError, KeyError, ValueError, TypeError):
        raise UserError(
            f"{file} is damaged or was not written by tapct embed; remove it, or give another --out"
        ) from None
    stamp = facts.pop("stamp", "")
    different = [key for key, value in made_with.items() if facts.get(key) != value]
    if different:
        raise UserError(
            f"{file} was made with another {different[0]}; one folder holds the vectors of one "
            "model and kind: give another --out, or remove its files"
        )
    return bool(is_whole and stamp == case.stamp())


def _write(h5py: ModuleType, file: Path, vector_D: np.ndarray, facts: dict[str, Any]) -> None:
    """Write one vector, whole or not at all.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(file) as opened, h5py.File(opened, "w") as content:
            content.create_dataset(DATASET, data=vector_D)
            content.attrs[ATTRIBUTE] = json.dumps(facts)
    except OSError as error:
        raise UserError(f"cannot write {file}: {files.first_cause(error)}") from error


def _missing_line(problems: dict[str, str], num: int, out: Path) -> str:
    names = ", ".join(list(problems)[:MOST_NAMES])
    more = len(problems) - MOST_NAMES
    ending = f" and {more} more" if more > 0 else ""
    return (
        f"{len(problems)} of {counted(num, 'scan')} have no vector in {out} ({names}{ending}); the "
        "lines above give the reasons; mend them and repeat the command, which computes the rest"
    )
