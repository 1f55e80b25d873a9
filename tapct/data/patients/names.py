"""Guess from names whether two scans are of one person.

A leak, one person on both sides of a split, is worse than a coarse split, two people that are kept
together. So a doubtful guess joins scans: folders below the first one, and endings of a name that
look like a visit, a phase or a reconstruction, do not make another person.

| path below the archive | person | why |
|---|---|---|
| `Meyer/ser2`, `p1/2019/scan` | `meyer`, `p1` | the first folder that can be a person |
| `imagesTr/case1_0000` | `case1` | `imagesTr` belongs to a layout, `_0000` is a channel |
| `train_1_a_2`, `case1_v2`, `Meyer_lung` | `train_1`, `case1`, `meyer` | endings are cut |
| `sub-01/ses-2/ct/sub-01_ses-2_ct` | `sub-01` | BIDS |
| `p7a`, `Meyer2019`, `P7Base` | `p7`, `meyer`, `p7` | so are endings without a separator |
| `CT1/p02`, `CT2/p02` | `p02` | `CT1` counts scans, since a name with a number follows |
| `batch1/ser2`, `batch2/ser2` | `batch1`, `batch2` | generic names do not join folders |
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tapct.data.formats import TITLES
from tapct.data.readers import FORMATS, stem_of

_BIDS = re.compile(r"(?:^|[/_])(sub-[a-z0-9]+)", re.IGNORECASE)
# a UID, a UUID or a date stays one word; all other words end at anything but a letter or a digit
_WORD = re.compile(
    r"\d+(?:\.\d+){4,}"
    r"|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    r"|(?:19|20)\d\d[-_.](?:0\d|1[0-2])[-_.](?:[0-2]\d|3[01])(?!\d)"
    r"|\d+\.\d+mm"
    r"|[^\W_]+",
    re.IGNORECASE,
)
_YEAR = r"(?:19|20)\d\d"
_MONTH, _DAY = r"(?:0[1-9]|1[0-2])", r"(?:0[1-9]|[12]\d|3[01])"
_DATE = re.compile(rf"{_YEAR}(?:[-_.]?{_MONTH}[-_.]?{_DAY}(?:t?\d{{4,6}})?)?|{_DAY}{_MONTH}{_YEAR}")

# words of a visit, a series or a reconstruction that carry a number: v2, ses-01, phase_1, Eq_1
_COUNTED_TEXT = """
    v t tp fu ses session sess visit timepoint time followup scanner phase ser series se sr rec
    recon reco reconstruction acq acquisition run rep repeat day week month year slice sl im eq
    echo bolus dyn frame bin gate channel ch copy version rev
"""
_COUNTED = frozenset(_COUNTED_TEXT.split())
# words of a visit, a phase, a reconstruction or a region of the body
_ENDINGS_TEXT = """
    base baseline bl follow up fup first second third last screening staging restaging
    pre post preop postop prior previous current before after initial
    retest pretreatment posttreatment treatment planning simulation sim arterial art venous ven
    portal portalvenous portovenous pv pvp delayed delay late early native nativ nc ncct
    noncontrast nocontrast contrast cm ce cect plain unenhanced enhanced nephrographic excretory
    corticomedullary hepatic parenchymal equilibrium washout km insp inspiration inhale inh exp
    expiration exhale exh breathhold freebreathing avg average mip minip iodine mono vmi vnc
    lung lungs soft softtissue tissue bone bones mediastinum mediastinal sharp smooth medium std
    standard detail edge thin thick axial ax coronal cor sagittal sag oblique mpr kernel eq
    filter fbp asir admire safire dlir idose head neck brain skull chest thorax thoracic abdomen
    abd abdominal pelvis pelvic spine leg legs arm arms wholebody wb body trunk tap cap
    resampled resample iso isotropic cropped crop reg registered aligned norm normalized
    normalised preprocessed processed converted corrected denoised defaced deface reoriented
    final new old
"""
_ENDINGS = frozenset(_ENDINGS_TEXT.split())
_KERNELS = r"[bdhuijqt][a-z]?\d{2}[a-z]|(?:b[rlvfpy]|h[rcvpsf]|qr|u[br])\d{2}|fc\d{2}|i?dose\d?"
_SIZES = r"\d+(?:\.\d+)?mm|\d+kvp?|\d+mas?|\d+kev|asir\d+|\d{1,3}pct"
_ENDING = re.compile(rf"(?:{'|'.join(sorted(_COUNTED))})\d+[a-z]?|{_KERNELS}|{_SIZES}")
# words for a scan that do not identify a person; with a number they may count people
_WEAK_TEXT = """
    ct cta ctpa cbct ldct hrct scan scans image images img imgs volume volumes vol vols study
    studies exam exams file files data dicom dicoms dcm nii nifti niftis nrrd mha hu input
    inputs output original originals orig raw source
"""
_WEAK = frozenset(_WEAK_TEXT.split())
# words of a modality or a file format: with a number they count the scans of a person, or people
_MODALITY_TEXT = """
    ct cta ctpa cbct ldct hrct dicom dicoms dcm nii nifti niftis nrrd data raw input output
"""
_MODALITY = frozenset(_MODALITY_TEXT.split())
# words of folders that hold many people; a name of several words is written with _
_LAYOUT_TEXT = """
    dataset datasets rawdata sourcedata derivatives archive archives export exports download
    downloads collection labels label labelstr labelsts masks mask segmentations imagestr
    imagests imagesva imagesval train training val valid validation test testing tr ts va
    patients patient subjects subject cases case cohort cohorts batch batches part parts fold
    folds split splits chunk chunks shard shards public private internal external dcms cts
    ground_truth label_maps
"""
# a folder that is named after a scan format (nii, mgz) holds scans of many people
_FORMAT_FOLDERS = frozenset(title.lower() for title in TITLES.values()) | frozenset(
    suffix.split(".")[1] for known in FORMATS if not known.is_series for suffix in known.suffixes
)
_LAYOUT = frozenset(_LAYOUT_TEXT.split()) | _FORMAT_FOLDERS
# folders of one of several sets of people; another folder of this kind holds other people
_SETS = re.compile(
    r"(?:images|labels)?(?:tr|ts|va|val|train|test)|train(?:ing)?|valid(?:ation)?|val|test(?:ing)?"
    r"|(?:batch|part|fold|split|chunk|shard|dataset|cohort|task)[-_ ]?\d+.*",
    re.IGNORECASE,
)
_OF_DATASET = re.compile(r"(?:images|labels)(?:tr|ts|va)|train(?:ing)?|val(?:id(?:ation)?)?", re.I)
_NUMBERED_SET = re.compile(
    r"(?:dataset|task)\d+(?:[-_].*)?|(?:batch|part|fold|split|chunk|shard|cohort)\d+"
)
# words of a patient: a number that follows one of them is the patient's, whatever came before
_PERSON_TEXT = """
    case patient pat pt subject subj sub person proband participant id
"""
_PERSON = frozenset(_PERSON_TEXT.split())
# public data sets whose own name ends in a number
_NUMBERED_NAMES = re.compile(r"(?:flare|amos|kits|lits|luna|verse|btcv|covid|sarscov)\d{1,4}")
# endings that no separator sets off: P01Arterial, p77a, Meyer2019
_CAMEL = re.compile(
    r"(?<=[^\W_A-Z])(?=[A-Z][a-z\d])"  # P01Arterial, MeyerV1
    r"|(?<=[A-Z])(?=[A-Z][a-z])"  # patAPre
    r"|(?<=[a-z][A-Z])(?=V\d)"  # patAV1
    r"|(?<=[a-z])(?=[A-Z]{2,}\d*$)"  # MeyerFU, MeyerCT
)
_HEX_HASH = re.compile(r"[0-9a-f]{8,}")
_ATTACHED = re.compile(r"(.*?\d)([^\W\d_]+\d*)")
# a visit after the number of a person: P01S2, case12M06; site01s05 may be a subject of a site
_NUMBERED_VISIT = re.compile(r"[smwyd]\d{1,2}")
_NUMBERED_PERSON = re.compile(r"(?:p|case|patient|pat|pt|subject|subj|sub|participant|id)\d+")
_NAME_AND_DATE = re.compile(rf"([^\W\d_]{{3,}})({_DATE.pattern})")


def _sequence_of(names: Iterable[str]) -> re.Pattern[str]:
    """Pattern of one or more of these names, each word with a space after it."""
    each = sorted("".join(f"{re.escape(word)} " for word in _WORD.findall(name)) for name in names)
    return re.compile(f"(?:{'|'.join(each)})+")


_LAYOUT_NAME = _sequence_of(_LAYOUT | _WEAK)


class NameKind(Enum):
    """What a name identifies: a person, a number in a list, or nothing."""

    PERSON = "whose it is"
    COUNT = "a generic word and a number"
    NOTHING = "only words that many scans share"


@dataclass(frozen=True)
class Reading:
    """The kind of a name, and the identifier in it; empty where it identifies nobody."""

    kind: NameKind
    identifier: str = ""


def bids_subject(relative: Path) -> str:
    """The `sub-XX` of a path in lower case; empty where there is none."""
    match = _BIDS.search(relative.as_posix())
    return match[1].lower() if match else ""


def guessed_identifier(relative: Path, *, is_series: bool) -> str:
    """Guess an identifier that all scans of one person share.

    Args:
        relative: path of the scan below the archive.
        is_series: whether it is a DICOM series: its folders alone count, since names of slices are
            counted by the scanner.
    Returns:
        The identifier; empty where not even a folder separates scans.
    """
    folders, stem = _parts(relative, is_series)
    start, sets = _start(folders), [name for name in folders if _SETS.fullmatch(name)]
    for name, below in zip(folders[start:], [*folders[start + 1 :], stem]):
        reading = read_name(name)
        if is_layout(name) or reading.kind is NameKind.NOTHING or _is_numbered_scan(name, below):
            continue
        return _scoped(reading, sets)
    reading = read_name(stem)
    if reading.kind is NameKind.NOTHING:
        return "/".join(folders)
    return _scoped(reading, sets)


def person_and_visit(relative: Path, *, is_series: bool) -> str:
    """The identifier of `guessed_identifier`, where the folder below the person's is a visit, such
    as `p1/2019` or `p1/baseline`; else empty.
    """
    folders, _ = _parts(relative, is_series)
    for name, below in zip(folders[_start(folders) :], folders[_start(folders) + 1 :]):
        if is_layout(name) or read_name(name).kind is NameKind.NOTHING:
            continue
        is_visit = read_name(below).kind is NameKind.NOTHING and not is_layout(below)
        return guessed_identifier(relative, is_series=is_series) if is_visit else ""
    return ""


def is_layout(folder: str) -> bool:
    """Whether a folder's name belongs to the layout of an archive, such as imagesTr or batch1."""
    name = _folded(folder)
    words = _words(name)
    if _NUMBERED_SET.fullmatch("".join(words)) or _NUMBERED_SET.fullmatch(name):
        return True
    return _LAYOUT_NAME.fullmatch("".join(f"{word} " for word in words)) is not None


def read_name(name: str) -> Reading:
    """Read a file's stem or a folder's name, up to the first word that looks like an ending."""
    words = [_without_ending(word) for word in _words(_folded(name))]
    words = [word for word in words if not _NUMBERED_NAMES.fullmatch(word)] or words
    kept: list[str] = []
    weak = ""
    place = 0
    while place < len(words):
        word = words[place]
        place += 1
        if _is_ending(word):
            if kept:
                break
            if word in _COUNTED and place < len(words) and words[place].isdigit():
                place += 1  # the number belongs to it: ses-01, phase_1
        elif word in _WEAK or word.rstrip("0123456789") in _WEAK:
            if kept:
                break
            weak = word
            if word not in _WEAK and place < len(words) and words[place].isdigit():
                place += 1  # img0001_0000: a channel or a series
        elif any(letter.isdigit() for letter in word):
            kept.append(word)
            kept += _patient_after(words[place:])
            break
        elif kept and len(word) == 1:
            break  # train_a, train_b
        else:
            kept.append(word)
    return _judged(kept, weak)


def _judged(kept: Sequence[str], weak: str) -> Reading:
    """The reading of the words that were kept, after a generic word or none."""
    counts = [word for word in kept if word.isdigit()]
    if weak and not kept:
        return Reading(NameKind.NOTHING) if weak in _WEAK else Reading(NameKind.COUNT, weak)
    if weak and len(counts) == len(kept):
        return Reading(NameKind.COUNT, f"{weak.rstrip('0123456789')}{counts[0]}")
    if not kept or (weak and all(len(word) == 1 for word in kept)):
        return Reading(NameKind.NOTHING)
    return Reading(NameKind.PERSON, "_".join(kept))


def _patient_after(words: Sequence[str]) -> list[str]:
    """The words up to a patient's number, as in kits_v1_case_00001; empty where there is none."""
    for place, word in enumerate(words):
        head = word.rstrip("0123456789")
        if head not in _PERSON:
            continue
        if head != word:
            return [word]
        if place + 1 < len(words) and words[place + 1].isdigit():
            return [word, words[place + 1]]
    return []


def _is_ending(word: str) -> bool:
    """Whether a word belongs to a visit, a phase or a reconstruction, or is a date."""
    return (
        word in _ENDINGS
        or word in _COUNTED
        or _ENDING.fullmatch(word) is not None
        or _DATE.fullmatch(word) is not None
    )


def _words(name: str) -> list[str]:
    return _WORD.findall(name)


def _folded(name: str) -> str:
    """A name in lower case, with composed accents, and with its endings set off: P01Arterial."""
    chunks = _CAMEL.split(unicodedata.normalize("NFC", name))
    folded = chunks[0]
    for chunk in chunks[1:]:
        first = (_words(chunk.casefold()) or [""])[0]
        # a number stays attached: LiverCT2 and LiverCT_2 may be of other people than LiverCT3
        is_end = _is_ending(first) or chunk.casefold() in _WEAK
        folded += f"_{chunk}" if is_end else chunk
    return unicodedata.normalize("NFC", folded.casefold())


def _without_ending(word: str) -> str:
    """A word without the ending that is attached to it: a letter or a phase after a number, or a
    year or a date after a name. Words that count, such as case2019, keep their number.
    """
    if _is_ending(word) or _HEX_HASH.fullmatch(word) or not word.isalnum():
        return word
    dated = _NAME_AND_DATE.fullmatch(word)
    if dated and not _is_counting(dated[1]):
        return dated[1]
    attached = _ATTACHED.fullmatch(word)
    if attached:
        person, ending = attached[1], attached[2]
        word_alone = ending.rstrip("0123456789")
        if len(ending) == 1 or word_alone in _WEAK or word_alone in _ENDINGS or _is_ending(ending):
            return person
        if _NUMBERED_VISIT.fullmatch(ending) and _NUMBERED_PERSON.fullmatch(person):
            return person
    return word


def _is_counting(word: str) -> bool:
    """Whether a word is one that a running number follows."""
    return any(word in words for words in (_PERSON, _WEAK, _COUNTED, _LAYOUT, _ENDINGS))


def _is_numbered_scan(folder: str, below: str) -> bool:
    """Whether a folder such as CT1 counts scans: the name below it is a person's, with a number.

    UIDs are no such names, since each series of a person has one of its own.
    """
    reading = read_name(folder)
    if (
        reading.kind is not NameKind.COUNT
        or reading.identifier.rstrip("0123456789") not in _MODALITY
    ):
        return False
    inner = read_name(below)
    has_letter = any(letter.isalpha() for letter in inner.identifier)
    has_number = any(letter.isdigit() for letter in inner.identifier)
    return inner.kind is NameKind.PERSON and has_letter and has_number and not is_uid(below)


def _parts(relative: Path, is_series: bool) -> tuple[list[str], str]:
    """The folders and the stem that count: of a series its folders alone."""
    parts = [part for part in relative.parts if part != "."]
    if not is_series:
        return parts[:-1], stem_of(relative)
    has_file = bool(parts) and "." in parts[-1] and not is_uid(parts[-1])
    return (parts[:-1] if has_file else parts), ""


def is_uid(name: str) -> bool:
    """Whether a name is a DICOM UID: numbers with points between them."""
    return re.fullmatch(r"\d+(?:\.\d+){4,}", name) is not None


def _start(folders: Sequence[str]) -> int:
    """The first folder that can be a person: those above imagesTr, train and the like are sets."""
    places = [place for place, name in enumerate(folders) if _OF_DATASET.fullmatch(name)]
    return places[-1] + 1 if places else 0


def _scoped(reading: Reading, sets: Sequence[str]) -> str:
    """The identifier; a counted one, such as scan1, only within its set of people."""
    if reading.kind is NameKind.COUNT:
        return "/".join([*sets, reading.identifier])
    return reading.identifier
