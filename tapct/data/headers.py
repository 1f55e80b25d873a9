"""Facts about a scan and names of labels, from the file's header and its JSON side-car."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from tapct.base.exits import single_line
from tapct.data.discover import stem_of
from tapct.data.patients import hash_of_header
from tapct.data.readers.raw import MAX_TEXT, Header
from tapct.types import Refused, ScanFacts

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
}
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
    except (OSError, ValueError) as error:
        raise Refused(
            "bad_sidecar", single_line(f"{sidecar.name} is not JSON: {error}", MAX_TEXT)
        ) from error
    if not isinstance(content, dict):
        raise Refused(
            "bad_sidecar", f"{sidecar.name} holds a {type(content).__name__}; rule: one JSON object"
        )
    return content


def merge_sidecar(header: Header, sidecar: dict[str, Any]) -> Header:
    """A header whose fields are replaced by those that the side-car gives."""
    given = {
        field: single_line(sidecar[key], MAX_TEXT)
        for field, key in SIDECAR_KEYS.items()
        if sidecar.get(key) not in (None, "", [])
    }
    return replace(header, **given)


def facts_of(header: Header, key: bytes | None) -> ScanFacts:
    """The facts of a header that tapct keeps, cleaned; the patient only as a keyed hash.

    Args:
        header: header of the scan, completed by its side-car.
        key: secret of the keyed hashes; None leaves the patient empty.
    """
    date = re.sub(r"\D", "", header.study_date)
    sex = header.sex.strip()[:1].upper()
    return ScanFacts(
        patient=hash_of_header(header.patient_id, key),
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


def label_names(path: Path, sidecar: dict[str, Any]) -> tuple[tuple[int, str], ...]:
    """Names of labels from a side-car: {"labels": {"1": "liver"}} or {"labels": {"liver": 1}}.

    Args:
        path: path of the label map, for the error line.
        sidecar: content of its side-car.
    Returns:
        Label value and name, in ascending order; empty where the side-car has no `labels`.
    Raises:
        Refused: `bad_sidecar`, `labels` is not a table of values and names.
    """
    table = sidecar.get("labels", {})
    if not isinstance(table, dict):
        raise Refused(
            "bad_sidecar", f"'labels' beside {path.name} is not a JSON object of values and names"
        )
    pairs = []
    for left, right in table.items():
        value, name = (left, right) if str(left).isdigit() else (right, left)
        if not str(value).isdigit():
            raise Refused(
                "bad_sidecar",
                f"'labels' beside {path.name} has '{left}': '{right}'; rule: a value and a name",
            )
        pairs.append((int(value), str(name)))
    return tuple(sorted(pairs))
