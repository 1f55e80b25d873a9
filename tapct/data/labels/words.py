"""How label files and scans are named: the words in their names, and the keys by which they match.

Two names belong together where they share a key, e.g. `case1_0000` and `case1_seg` (key `case1`),
or `img0001` and `label0001` (key `#0001`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_LABEL_WORD = "segmentations?|segs?|dseg|masks?|msk|labels?|lbl|gt|annotations?|contours?|rtstruct"
_IMAGE_WORD = "images?|imaging|imgs?|volumes?|scans?|cts?"
_CHANNEL = re.compile(r"(?P<case>.+)_0000")
_IMAGE_SUFFIX = re.compile(rf"(?P<case>.+?)[_.-](?:{_IMAGE_WORD})", re.IGNORECASE)
_LABEL_SUFFIX = re.compile(rf"(?P<case>.+?)[_.-](?:{_LABEL_WORD})\d*", re.IGNORECASE)
_IMAGE_NUMBER = re.compile(rf"(?:{_IMAGE_WORD})[_-]?(?P<number>\d+)", re.IGNORECASE)
_LABEL_NUMBER = re.compile(rf"(?:{_LABEL_WORD})[_-]?(?P<number>\d+)", re.IGNORECASE)
_ONLY_LABEL = re.compile(rf"(?:{_LABEL_WORD})(?:[_.-](?:{_LABEL_WORD}))*", re.IGNORECASE)
_IMAGE_FOLDER = re.compile(r"(?:images?|imgs?|volumes?|scans?|cts?)(?P<rest>.*)", re.IGNORECASE)
LABEL_FOLDERS = ("labels", "label", "masks", "mask", "segmentations", "segmentation", "segs", "gt")
_MASK_FOLDER = re.compile(rf"(?:{_LABEL_WORD}|organs?|structures?|rois?)", re.IGNORECASE)


def scan_keys(stem: str) -> tuple[str, ...]:
    """Keys of a scan, the surest first: its stem, the stem without nnU-Net's channel number
    (case_0000) or a word for an image (case_ct), the number after such a word (volume-3).
    """
    keys = [stem]
    for pattern in (_CHANNEL, _IMAGE_SUFFIX):
        match = pattern.fullmatch(stem)
        if match:
            keys.append(match["case"])
    match = _IMAGE_NUMBER.fullmatch(stem)
    if match:
        keys.append("#" + match["number"])
    return tuple(dict.fromkeys(keys))


def label_keys(stem: str) -> tuple[str, ...]:
    """Keys of a label file: its stem, the stem without its part that means labels (case_seg,
    case-label), the number after such a part (segmentation-3).
    """
    return (stem, *keys_by_word(stem))


def keys_by_word(stem: str) -> tuple[str, ...]:
    """The keys of a label file that it has because a word in its name means labels; empty where
    none does.
    """
    number, suffix = _LABEL_NUMBER.fullmatch(stem), _LABEL_SUFFIX.fullmatch(stem)
    if number:
        return ("#" + number["number"],)
    return (suffix["case"],) if suffix and not _ONLY_LABEL.fullmatch(stem) else ()


def is_only_label_word(stem: str) -> bool:
    """Whether a whole name means labels: `segmentation`, `mask`, `Segmentation.seg`."""
    return _ONLY_LABEL.fullmatch(stem) is not None


def is_mask_folder(name: str) -> bool:
    """Whether a folder of this name may hold one mask per organ."""
    return _MASK_FOLDER.fullmatch(name) is not None


def is_label_folder_of(name: str, scan_stem: str) -> bool:
    """Whether a folder is named like the labels of one scan: `case1_seg/` of case1."""
    return bool(set(keys_by_word(name)) & set(scan_keys(scan_stem)))


def label_folder_names(image_folder: str) -> tuple[str, ...]:
    """Names, in lower case, that the folder of the labels may have beside a folder of images:
    imagesTr -> labelstr, maskstr, ...; empty where the name does not begin with a word for images.
    """
    match = _IMAGE_FOLDER.fullmatch(image_folder)
    if match is None:
        return ()
    return tuple(word + match["rest"].lower() for word in LABEL_FOLDERS)


def ambiguous_keys(stems: Iterable[str]) -> frozenset[str]:
    """Keys that several scans of one folder share; only a scan whose stem a key is may use it."""
    counts = Counter(key for stem in stems for key in scan_keys(stem)[1:])
    stems = set(stems)
    return frozenset(key for key, count in counts.items() if count > 1 or key in stems)
