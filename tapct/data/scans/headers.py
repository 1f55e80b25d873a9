"""Facts about a scan, from the file's header and its JSON side-car."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from tapct.base.exits import single_line
from tapct.base.marks import file_name
from tapct.data.patients.identity import hash_of_patient_id
from tapct.data.patients.key import keyed_hash
from tapct.data.patients.stand_ins import numbered_stand_in
from tapct.data.readers import stem_of
from tapct.data.readers.raw import MAX_TEXT, Header
from tapct.types import PatientClues, Refused, ScanFacts

# field of Header and the key of a side-car, as BIDS and dcm2niix write it
SIDECAR_KEYS = {
    "patient_id": "PatientID",
    "study_uid": "StudyInstanceUID",
    "series_uid": "SeriesInstanceUID",
    "study_date": "StudyDate",
    "modality": "Modality",
    "manufacturer": "Manufacturer",
    "kernel": "ConvolutionKernel",
    "sex": "PatientSex",
    "age": "PatientAge",
    "model": "ManufacturersModelName",
    "kvp": "KVP",
    "thickness": "SliceThickness",
    "contrast": "ContrastBolusIngredient",
    "body_part": "BodyPartExamined",
}
_IDENTIFIERS = frozenset(("patient_id", "study_uid", "series_uid"))
YEARS_PER_UNIT = {"": 1.0, "Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}


def read_sidecar(path: Path) -> dict[str, Any]:
    """The JSON object of NAME.json beside NAME; empty where there is no such file.

    Raises:
        Refused: `bad_sidecar`, the file is not a JSON object.
    """
    sidecar = path.with_name(stem_of(path) + ".json")
    if not sidecar.is_file():
        return {}
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last: thousands of brackets
        place = "it cannot be read" if isinstance(error, OSError) else "it is no text in UTF-8"
        if isinstance(error, json.JSONDecodeError):
            place = f"see line {error.lineno}, column {error.colno}"
        elif isinstance(error, RecursionError):
            place = "its brackets are nested too deeply"
        raise Refused(
            "bad_sidecar", f"{file_name(sidecar)} is not JSON: {place}; correct the file"
        ) from error
    if not isinstance(content, dict):
        raise Refused(
            "bad_sidecar",
            f"{file_name(sidecar)} holds a {type(content).__name__}; rule: one JSON object",
        )
    return content


def merge_sidecar(header: Header, sidecar: dict[str, Any]) -> Header:
    """A header whose fields are replaced by those that the side-car gives."""
    given = {}
    for field, key in SIDECAR_KEYS.items():
        value = sidecar.get(key)
        if value in (None, "", []):
            continue
        if field in _IDENTIFIERS and not _is_identifier(value):
            continue
        given[field] = single_line(value, MAX_TEXT)
    return replace(header, **given)


def _is_identifier(value: object) -> bool:
    """Whether a value of JSON can be an identifier: true, lists and objects identify nobody."""
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def facts_of(header: Header, key: bytes | None, patient_from: str = "header") -> ScanFacts:
    """The facts of a header that tapct keeps, cleaned; the patient only as a keyed hash.

    Args:
        header: header of the scan, completed by its side-car.
        key: secret of the keyed hashes; None leaves the patient empty.
        patient_from: `header` or `side_car`, where the header's `patient_id` is from.
    """
    date = re.sub(r"\D", "", header.study_date)
    sex = header.sex.strip()[:1].upper()
    patient = hash_of_patient_id(header.patient_id, key)
    clues = PatientClues()
    if key:
        number = numbered_stand_in(header.patient_id)
        study, series = header.study_uid.strip(" \0"), header.series_uid.strip(" \0")
        clues = PatientClues(
            patient_from=patient_from if patient else "",
            study=keyed_hash(key, f"study {study}") if study else "",
            series=keyed_hash(key, f"series {series}") if series else "",
            pseudonym=keyed_hash(key, f"stand-in {number}") if number else "",
            has_stand_in=bool(header.patient_id.strip(" \0")) and not patient,
        )
    return ScanFacts(
        patient=patient,
        clues=clues,
        study_date=date if len(date) == 8 else "",
        manufacturer=header.manufacturer,
        kernel=header.kernel,
        sex=sex if sex in ("M", "F", "O") else "",
        age_years=_age_years(header.age),
    )


def _age_years(text: str) -> float:
    """Years from DICOM's `063Y`, `018M`, `012W`, `003D`, from words such as `63 years`, or from a
    plain number; NaN for anything else.
    """
    units = "Y|M|W|D|YRS?|YEARS?|MONTHS?|WEEKS?|DAYS?"
    match = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*({units})?(?: OLD)?\s*", text.upper())
    return float(match[1]) * YEARS_PER_UNIT[(match[2] or "")[:1]] if match else float("nan")
