"""PatientIDs: one form for all ways of writing it, and the ones that identify nobody, as
anonymisation, export and test software writes them.
"""

from __future__ import annotations

import re
import unicodedata

_WORDS_TEXT = """
    none null nil nan na unknown unk unkown undefined unspecified unassigned unavailable
    notavailable notgiven notspecified notapplicable missing empty blank default dummy fake test
    testpatient removed remove deleted delete cleared erased stripped redacted masked hidden
    withheld suppressed private confidential protected sensitive censored obfuscated replaced
    deid deidentified deidentify noid nopatientid noname nopatient patient patientid patientname
    pid id mrn subject subjectid name johndoe janedoe doe human homosapiens xnat dicom
"""
_WORDS = frozenset(_WORDS_TEXT.split())
_PREFIXES = ("anon", "removed", "redacted", "deidentified", "pseudonym", "unknown", "dummy")
_NUMBERS = re.compile(r"0+|9{4,}")


def canonical_id(text: str) -> str:
    """One form for all ways of writing an identifier.

    Upper and lower case, spaces around it, leading zeros of its numbers, the `.0` that tables of
    floating-point numbers append, and composed or decomposed accents do not make another patient.
    """
    text = " ".join(unicodedata.normalize("NFKC", text).replace("\0", " ").split()).strip(" ^")
    text = unicodedata.normalize("NFKC", text.casefold().upper())
    if re.fullmatch(r"\d+(?:\.\d+)?E\+\d+", text):
        text = str(int(float(text))) if float(text).is_integer() else text
    text = re.sub(r"(\d+)\.0+", r"\1", text) if re.fullmatch(r"\d+\.0+", text) else text
    return re.sub(r"(?<!\d)0+(?=\d)", "", text)


def is_stand_in(patient_id: str) -> bool:
    """Whether a PatientID identifies nobody: empty, REMOVED, ANON..., 0, xxx, and the like.

    Case, spaces and punctuation do not matter. A numbered stand-in such as ANON0012 is one too; see
    `numbered_stand_in`.
    """
    text = _letters_and_digits(patient_id)
    if not text:
        return True  # empty, or punctuation alone: "-", "???", "<>"
    if _NUMBERS.fullmatch(text) or re.fullmatch(r"x+", text):
        return True
    return text in _WORDS or text.startswith(_PREFIXES)


def numbered_stand_in(patient_id: str) -> str:
    """A stand-in with a number, as some software writes one for each patient; empty for others.

    Two scans with the same number may be of one patient, so they are kept together; two scans with
    different numbers may be of one patient too.
    """
    text = _letters_and_digits(patient_id)
    is_numbered = text.startswith(_PREFIXES) and any(letter.isdigit() for letter in text)
    return text if is_numbered else ""


def _letters_and_digits(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum())
