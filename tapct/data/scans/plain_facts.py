"""Facts of a header in words that cannot be a person's name, for the manifest and for messages.

Whatever a file holds as free text may hold a name. So a maker is mapped to a list of makers, a
kernel must look like one, and a line about a scan names neither its files nor its folders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tapct.base.exits import single_line
from tapct.base.marks import HIDDEN, without_marked
from tapct.data.readers import stem_of
from tapct.types import MAX_DETAIL

_NUMBERS = re.compile(r"[\d\s.,+\-eExX()\[\]]+")
# words that headers of scans hold and that lines about them quote
_HEADER_WORDS_TEXT = """
    ct mr pt pet us cr dx mg nm xa rf ot sc seg sr pr rtstruct rtdose rtplan rtimage reg ko hu
    gzip gz raw ascii text txt hex bzip bz nrrd meta list vector rgb rgba color point scalar
    complex matrix quaternion normal covariant domain space time none left right anterior
    posterior superior inferior lps ras las scanner xyz short ushort int uint char uchar float
    double long signed unsigned int8 block type dimension sizes encoding kinds ndims dimsize
    elementtype elementspacing transformmatrix offset labels modality original primary secondary
    derived axial localizer
"""
_HEADER_WORDS = frozenset(_HEADER_WORDS_TEXT.split())
# A quoted text may hold apostrophes of its own ('O'Brien'); one between two letters neither begins
# nor ends a quotation.
_QUOTED = re.compile(r"((?:(?:RescaleType|ImageType|Modality) is )?)(?<!\w)'(.*?)'(?!\w)")
_QUOTE = re.compile(r"(?<!\w)'|'(?!\w)")
# values of RescaleType, ImageType and Modality in the DICOM standard
_CODES_TEXT = """
    HU HU_MOD US OD MGML Z_EFF ED EDW PCT ORIGINAL DERIVED PRIMARY SECONDARY AXIAL LOCALIZER MPR MIP
    MINIP PROJECTION VOLUME REFORMATTED SCOUT TOPOGRAM NONE OTHER RESAMPLED MIXED CT_SOM5 CT_SOM7
    SPI TOP STD SNRG DET CSA CSAPARALLEL CSA_RESAMPLED DOSE_INFO SCREEN_SAVE SCREEN
    AU BI BMD CR CT DX ECG EPS ES GM IO KO LS MG MR NM OCT OP OPT OT PR PT REG RF RG RTDOSE RTIMAGE
    RTPLAN RTRECORD RTSTRUCT SC SEG SM SMR SR TG US XA XC
"""
_CODES = frozenset(_CODES_TEXT.split())
OTHER = "other"  # a text that is there, but that no list or pattern knows
_MAKERS = {
    "siemens": "Siemens",
    "ge": "GE",
    "general electric": "GE",
    "philips": "Philips",
    "toshiba": "Toshiba",
    "canon": "Canon",
    "hitachi": "Hitachi",
    "fujifilm": "Fujifilm",
    "united imaging": "United Imaging",
    "uih": "United Imaging",
    "neusoft": "Neusoft",
    "samsung": "Samsung",
    "neurologica": "NeuroLogica",
    "shimadzu": "Shimadzu",
    "picker": "Picker",
    "marconi": "Marconi",
    "elscint": "Elscint",
    "imatron": "Imatron",
    "accuray": "Accuray",
    "varian": "Varian",
    "elekta": "Elekta",
    "brainlab": "Brainlab",
    "medtronic": "Medtronic",
    "mediso": "Mediso",
    "carestream": "Carestream",
    "planmeca": "Planmeca",
    "newtom": "NewTom",
    "vatech": "Vatech",
    "morita": "Morita",
    "sirona": "Sirona",
    "minfound": "MinFound",
    "anke": "Anke",
    "sinovision": "SinoVision",
    "wandong": "Wandong",
    "phantom": "phantom",
}
# Siemens B30f, Br40d, Qr40\\3, I30f; Canon and Toshiba FC08; Philips YA, L, IMR1; GE by words
_KERNEL = re.compile(
    r"[A-Z][a-z]?\d{2}[a-z]?|FC\d{2}[A-Z]?|FL\d{2}|IMR\d?|IR\d?|Y[A-E]|U[AB]|E[BC]|S[AB]|[A-EL]",
)
_KERNEL_WORDS_TEXT = """
    standard soft lung bone boneplus bone+ detail edge edge+ chest ultra sharp smooth medium
    body brain head abdomen std stnd hd hdstd std+ spine ear sinus
"""
_KERNEL_WORDS = frozenset(_KERNEL_WORDS_TEXT.split())
_STRENGTH = re.compile(r"\d{1,2}")
_LENGTH = re.compile(r"<\d+ characters>")  # in place of a text that may be a name
CANNOT_BE_READ = "the file cannot be read: "  # of the disk's faults, which may pass


def maker(text: str) -> str:
    """The maker of a scanner by its short name; `other` for a text that names none of the list."""
    words = " ".join(re.findall(r"[a-z]+", text.lower()))
    for name, short in _MAKERS.items():
        if re.search(rf"\b{name}", words) if len(name) > 3 else re.search(rf"\b{name}\b", words):
            return short
    return OTHER if text.strip() else ""


def kernel(text: str) -> str:
    """A kernel as the header writes it, where it looks like one (`B30f`, `FC08`, `STANDARD`), with
    its strength (`Qr40/3`); `other` for any other text.
    """
    parts = [part.strip() for part in re.split(r"[/\\]", text) if part.strip()]
    if not parts:
        return ""
    if not (_KERNEL.fullmatch(parts[0]) or parts[0].lower() in _KERNEL_WORDS):
        return OTHER
    return "/".join([parts[0], *(part for part in parts[1:] if _STRENGTH.fullmatch(part))])


def failure(error: BaseException) -> str:
    """One line about an exception of a reader library, whose own text may quote the file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{CANNOT_BE_READ}{error.strerror}"
    return (
        f"its reader failed ({type(error).__name__}); copy the file again, or convert it with "
        "another program"
    )


def without_names(line: str, root: Path, paths: Iterable[Path]) -> str:
    """A line about a scan without the names of its files and folders, and without quoted text that
    may come from a header.

    Names are hidden where `marks.file_name` has marked them. Whole paths, and file names with a
    suffix, are hidden everywhere, since a library may have put them into the line; no sentence
    contains them by chance. A line that has been through here is not changed again.

    Args:
        line: text of a refusal, with its marks.
        root: folder of the archive.
        paths: paths that belong to the scan: its files and its label map.
    """
    line = without_marked(line)
    names = {str(root): "<archive>", str(root.resolve()): "<archive>"}
    for path in paths:
        below = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
        names[str(path)] = HIDDEN
        if len(below.parts) > 1:
            names[str(below)] = HIDDEN
        if stem_of(below) != below.name:
            names[below.name] = HIDDEN
    for text in sorted(filter(None, names), key=len, reverse=True):
        line = re.sub(rf"(?<!\w){re.escape(text)}(?!\w)", names[text], line)
    if '"' in line or len(_QUOTE.findall(line)) % 2:
        # a text with a quotation mark of its own: everything between the first and the last mark
        line = re.sub("""['"].*['"]""", lambda match: f"'{_plain(match[0][1:-1], '')}'", line)
    else:
        line = _QUOTED.sub(lambda match: f"{match[1]}'{_plain(match[2], match[1])}'", line)
    return single_line(line, MAX_DETAIL)


def _plain(text: str, field: str) -> str:
    """A text that cannot be a name as it is; else how long it is.

    Args:
        text: what stands between the quotes.
        field: what stands before them, if it is a field with a closed vocabulary.
    """
    if not text or _NUMBERS.fullmatch(text) or _LENGTH.fullmatch(text):
        return text
    if field and all(word in _CODES for word in re.split(r"[/\\]", text)):
        return text
    if all(word.lower() in _HEADER_WORDS for word in re.findall(r"[^\W\d_]+", text)):
        return text
    return f"<{len(text)} characters>"
